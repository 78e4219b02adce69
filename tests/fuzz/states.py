"""States that are loaded: of LMs and programs, settings in TOML and in the environment, rows of the file, manifests."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import dspy

import dspy_prod
from dspy_prod import Budget, Cache, Price
from dspy_prod.lm.config import load_config
from dspy_prod.registry.published.copies import Release
from dspy_prod.registry.published.loading import put_into
from dspy_prod.registry.published.manifest import Manifest, PredictorEntry, sha256
from dspy_prod.registry.published.signatures import fields_of
from dspy_prod.registry.published.states import dumped
from dspy_prod.testing import ScriptedEngine
from tests.fuzz import invariants
from tests.fuzz.answers import PATIENCE
from tests.fuzz.draws import Draws
from tests.fuzz.judges import AWAY, judges
from tests.fuzz.mutations import STRANGE, broken, mutated
from tests.fuzz.secrets import SECRET

TOML: Final = """
model = "openai/gpt-4o-mini"
temperature = 0.0
max_tokens = 500
timeout = 20
api_key_env = "TEAM_KEY"
fallbacks = ["anthropic/claude-haiku-4-5"]
store = "memory://fuzz-toml"
namespace = "triage"
[retry]
attempts = 3
[breaker]
recovery_timeout = 60
[limit]
rpm = 500
tpm = 200_000
[cache]
ttl = 300
[[budget]]
usd = 50
per = "day"
[[budget]]
usd = 5
per = "hour"
scope = "tenant"
[prices."openai/my-model"]
input = 0.15
output = 0.60
[litellm]
aws_region_name = "eu-central-1"
"""
LINES: Final = (*TOML.splitlines(), "model = 5", "retry = true", "budget = []", "limit = {}", "[cache]", "[[prices]]",
                "x = 1979-05-27T07:32:00Z", "a.b.c = nan", "usd = inf", "rpm = -1", "=", '"" = ""', "model = '''",
                f'api_key = "{SECRET}"', "max_token = 5", "[retry.attempts]", "cache = false")  # fmt: skip
VARIABLES: Final = ("MODEL", "RETRY", "RETRY__ATTEMPTS", "BUDGET", "BUDGET__USD", "BUDGET__0__USD", "BUDGET__9__USD",
                    "LIMIT__RPM", "CACHE", "CACHE__TTL", "PRICES", "STORE", "FALLBACKS", "", "__", "A__B__C", "TIMEOUT",
                    "MAX_TOKENS", "API_KEY", "EXTRA_HEADERS", "LITELLM__X", "BREAKER", "NAMESPACE",
                    "ENGINE")  # fmt: skip

PLAIN: Final = {"model": "openai/m", "model_type": "chat", "cache": False, "num_retries": 0}
LURES: Final[tuple[dict[str, Any], ...]] = (
    {"config": {"api_base": AWAY}}, {"config": {"extra_headers": {"x": AWAY}, "temperature": 0.5}}, {"forward": AWAY},
    {"lm": {**PLAIN, "api_base": AWAY}}, {"lm": {**PLAIN, "fallbacks": [{"model": "openai/m", "api_base": AWAY}]}},
    {"lm": {**PLAIN, "base_url": AWAY}}, {"lm": {**PLAIN, "extra_body": {"api_base": AWAY}}}, {"callbacks": [AWAY]},
)  # fmt: skip
"""What a state of a program would send its calls elsewhere with."""


class States:
    """The fuzzer of what is loaded.

    Args:
        rows: whether rows of the SQLite file are what is changed.
    """

    def __init__(self, rows: bool = False) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="dspy-prod-fuzz-"))
        self._program = dspy.Predict("question, tone -> answer, score: float")
        self._program.demos = [dspy.Example(question="q", tone="t", answer="a", score=1.0).with_inputs("question")]
        self._lm = _lm()  # holds the secret, so that it is known for one wherever it turns up
        self._state = json.dumps(self._lm.dump_state())
        self._text = dumped("self", self._program)
        entry = PredictorEntry("self", None, None, sha256(self._text), fields_of(self._program.signature))
        self._manifest = Manifest("d", (entry,), "openai/m", "ChatAdapter", {}, dspy="3.4.1")
        self._files = 0
        self._rows = _file_with_rows(self._folder / "rows.db")
        self._ways: tuple[Callable[[Draws], None], ...] = (
            self._lm_state, self._toml, self._environment, self._manifest_text, self._program_state,
            judges,
        )  # fmt: skip
        if rows:
            self._ways = (self._row,)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """DSPy keeps no history in here."""
        with dspy.context(disable_history=True):
            yield

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def example(self, draws: Draws) -> str:
        """Load one state; "answer", or the class of the error."""
        way = draws.pick(self._ways)
        began = time.thread_time()
        try:
            way(draws)
        except invariants.Violation:
            raise
        except Exception as error:
            invariants.typed(error)
            return type(error).__name__
        finally:
            invariants.bounded(time.thread_time() - began, PATIENCE)
        return "answer"

    # -- what is loaded ----------------------------------------------------------------------------------------------
    def _lm_state(self, draws: Draws) -> None:
        state = _read(mutated(draws, self._state))
        if not isinstance(state, dict):
            return
        lm = dspy_prod.LM.load_state(state, allow_custom_lm_class=draws.one_in(3))
        invariants.as_json(lm.dump_state())

    def _toml(self, draws: Draws) -> None:
        text = TOML
        for _ in range(1 + draws.below(3)):
            lines = text.splitlines()
            at = draws.below(len(lines) + 1)
            how = draws.below(4)
            if how == 0:
                lines.insert(at, draws.pick(LINES))
            elif how == 1:
                lines[at : at + 1] = []
            elif how == 2 and lines:
                name = lines[at % len(lines)].partition("=")[0]
                lines[at % len(lines)] = f"{name}= {draws.pick(LINES).partition('=')[2] or '{}'}"
            text = "\n".join(lines)
        data = text.encode()
        path = self._folder / "prod.toml"
        path.write_bytes(broken(draws, data) if draws.one_in(3) else data)
        self._made(load_config(path, {}))

    def _environment(self, draws: Draws) -> None:
        env = {}
        for _ in range(1 + draws.below(4)):
            value = draws.pick(STRANGE)
            text = value if isinstance(value, str) else json.dumps(value)
            env[f"DSPY_PROD__{draws.pick(VARIABLES)}"] = text.removeprefix("\x00raw:").replace("\x00", "")
        path = None
        if draws.one_in(2):
            path = self._folder / "prod.toml"
            path.write_text(TOML)
        self._made(load_config(path, {"TEAM_KEY": SECRET, **env}))

    def _made(self, arguments: dict[str, Any]) -> None:
        if "model" in arguments and not str(arguments.get("store", "")).startswith("sqlite"):
            lm = dspy_prod.LM(**arguments)
            invariants.no_secret([repr(lm), json.dumps(lm.dump_state())])

    def _manifest_text(self, draws: Draws) -> None:
        text = mutated(draws, self._manifest.to_text())
        manifest = Manifest.of(broken(draws, text.encode()).decode(errors="replace") if draws.one_in(4) else text)
        put_into(dspy.Predict(self._program.signature), Release("triage", 1, manifest, {"self": self._text}))

    def _program_state(self, draws: Draws) -> None:
        text = mutated(draws, self._text)
        if draws.one_in(3):
            state = _read(self._text if draws.one_in(2) else text)
            text = json.dumps({**state, **draws.pick(LURES)} if isinstance(state, dict) else state)
        program = dspy.Predict(self._program.signature)
        before = repr(vars(program))
        try:
            put_into(program, Release("triage", 1, self._manifest, {"self": text}))
        except Exception:
            if repr(vars(program)) != before:
                raise invariants.Violation(
                    "whole or not at all", "a program was changed by a state it refused"
                ) from None
            raise
        invariants.stays(vars(program), AWAY)
        program.dump_state()

    def _row(self, draws: Draws) -> None:
        self._files += 1
        path = self._folder / f"rows-{self._files}.db"  # the last one may still be in use
        shutil.copyfile(self._rows, path)
        path.chmod(0o600)
        with closing(sqlite3.connect(path)) as connection:
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            for _ in range(1 + draws.below(3)):
                table = draws.pick(tables)
                columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
                value = draws.pick(STRANGE)
                if isinstance(value, str) and not draws.one_in(3):
                    value = value.encode("utf-8", "surrogatepass")
                elif not isinstance(value, (type(None), float)) or isinstance(value, bool):
                    value = json.dumps(value) if not isinstance(value, int) or abs(value) >= 2**63 else int(value)
                try:
                    connection.execute(f'UPDATE {table} SET "{draws.pick(columns)}" = ?', (value,))
                except (sqlite3.Error, UnicodeError):
                    continue  # the file itself refuses it
            connection.commit()
        _use(path)


def _lm(**more: Any) -> Any:
    return dspy_prod.LM(
        "openai/gpt-4o-mini",
        temperature=0.5,
        max_tokens=100,
        api_base="http://fuzz.invalid/v1",
        extra_headers={"x-fuzz": SECRET},
        budget=[Budget(usd=5), Budget(usd=1, per="day", scope="tenant")],
        limit={"rpm": 60},
        cache=Cache(ttl=60),
        prices={"openai/x": Price(input=1, output=1)},
        fallbacks=["openai/gpt-4o"],
        store="memory://fuzz-state",
        **more,
    )


def _engine_lm(path: Path) -> Any:
    engine = ScriptedEngine("ok")
    return dspy_prod.LM(
        "openai/rows",
        engine=engine,
        async_engine=engine.asynchronous,
        max_tokens=10,
        prices={"openai/rows": Price(input=1, output=1)},
        budget=[Budget(usd=5, name="all"), Budget(usd=1, per="day", scope="tenant", name="tenants")],
        limit={"rpm": 6_000},
        store=f"sqlite:///{path}",
        namespace="rows",
    )


def _file_with_rows(path: Path) -> Path:
    """A file in which every table has a row."""
    lm = _engine_lm(path)
    with dspy_prod.call_context(user="ann", tenant="acme", tags={"feature": "x"}):
        for number in range(3):
            lm(f"question {number}")
    lm.pipeline.store.flush(10)
    lm.pipeline.store.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode=DELETE")
    return path


def _use(path: Path) -> None:
    """Whatever reads the file: the ledger, costs, health, the cache, admission."""
    lm: Any = None
    questions: tuple[Callable[[], Any], ...] = (
        lambda: lm("question 1"),
        lambda: lm("another question"),
        lambda: invariants.as_json([record._asdict() for record in lm.ledger.records()]),
        lambda: lm.costs(),
        lambda: lm.costs(by="user"),
        lambda: lm.health(),
        lambda: lm.pipeline.store.flush(5),
    )
    try:
        lm = _engine_lm(path)
        first: Exception | None = None
        for question in questions:
            try:
                question()
            except Exception as error:
                invariants.typed(error)
                first = first or error
        if first is not None:
            raise first
    finally:
        if lm is not None:
            lm.pipeline.store.close()


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
