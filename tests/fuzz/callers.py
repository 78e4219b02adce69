"""Names, wherever one is taken: of users, tenants, sessions, tags, budgets, models, programs, filters, and on the
command line."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import dspy

import dspy_prod
from dspy_prod import Budget, Price, call_context
from dspy_prod.cli import main
from dspy_prod.registry.names import Reference, checked_name, encoded, predictor_prompt
from dspy_prod.testing import ScriptedEngine
from tests.fuzz import invariants
from tests.fuzz.answers import PATIENCE
from tests.fuzz.draws import Draws

PARTS: Final = (
    "a", "", "acme", "|", "/", "=", ":", "%", "*", "?", "'", '"', "`", "\\", "\n", "\r", "\t", " ", "\x00", "\x1b[31m",
    "\x9b", "\u202e", "\ufeff", "\u200b", "\ud800", "\U0001f9ff", "é", "e\u0301", "İ", "ß", "[red]", "[/]", "{}",
    "{0}", "%s", "../", "~", "-", "--", "--help", "-h", "anonymous", "nobody", "None", "null", "total", "other",
    "OTHER", "all", "9" * 30, "x" * 5_000, "1", "０", ";", "DROP TABLE calls;",
    "user-", "pseudonym:", "@", "@production", "#", "&",
    "<script>", "$HOME", "$(x)", "\u2028", "٣", "2026-11-28", "day", ".", "..", "con", "tenant=acme", "day/tenant",
)  # fmt: skip
STRANGERS: Final = (None, 5, 1.5, True, [], {}, b"acme", object())
"""What is no name."""
FIELDS: Final = ("user", "tenant", "session", "run", "program", "experiment", "variant", "prompt_version", "trace_id")
FILTERS: Final = ("user", "tenant", "session", "model", "program", "outcome", "trace_id", "call_id", "id", "route", "x")
COMMANDS: Final = (
    ("costs",), ("costs", "--by", "user"), ("costs", "--json"), ("calls",), ("calls", "--json"), ("health",),
    ("budgets",), ("budgets", "--json"), ("versions",), ("diff",), ("promote",), ("rollback",), ("check",), ("eval",),
)  # fmt: skip
OPTIONS: Final = ("--user", "--tenant", "--namespace", "--by", "--since", "--until", "--limit", "--model", "--store",
                  "--tag", "--format", "--json", "--days", "--last")  # fmt: skip
_made = itertools.count()


class Callers:
    """The fuzzer of names."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="dspy-prod-fuzz-"))
        self._lm = self._fresh("fuzz")
        self._left = 500
        self._ways: tuple[Callable[[Draws], None], ...] = (
            self._called, self._filtered, self._budgeted, self._named, self._referred,
        )  # fmt: skip

    @contextmanager
    def ready(self) -> Iterator[None]:
        """In a folder of its own, where commands find nothing."""
        here = os.getcwd()
        os.chdir(self._folder)
        try:
            with dspy.context(disable_history=True):
                yield
        finally:
            os.chdir(here)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def example(self, draws: Draws) -> str:
        """Say one name; "answer", or the class of the error."""
        self._left -= 1
        if self._left <= 0:  # a ledger of many records takes long to read
            self._left, self._lm = 500, self._fresh("fuzz")
        way = self._command if draws.one_in(25) else draws.pick(self._ways)
        began = time.thread_time()
        try:
            way(draws)
        except invariants.Violation:
            raise
        except (TypeError, ValueError) as error:
            if not isinstance(error, dspy_prod.ConfigError) and "call_context" not in str(error):
                invariants.typed(error)
            return type(error).__name__
        except Exception as error:
            invariants.typed(error)
            return type(error).__name__
        finally:
            invariants.bounded(time.thread_time() - began, PATIENCE)
        return "answer"

    # -- where names are taken ---------------------------------------------------------------------------------------
    def _called(self, draws: Draws) -> None:
        given: dict[str, Any] = {draws.pick(FIELDS): self._name(draws) for _ in range(1 + draws.below(3))}
        if draws.one_in(3):
            given["tags"] = {self._text(draws): self._name(draws)}
        with call_context(**given):
            self._lm(f"question {draws.below(3)}")
        record = self._lm.ledger.records(limit=1)[0]
        for name, value in given.items():
            if name not in ("tags", "run") and getattr(record, name) != value:
                raise invariants.Violation("own name", f"{name}={value!r} is recorded as {getattr(record, name)!r}")
        invariants.as_json(record._asdict())
        invariants.nothing_held(self._lm)

    def _filtered(self, draws: Draws) -> None:
        name, value = draws.pick(FILTERS), self._name(draws)
        if value is None:  # no filter
            return
        try:
            found = self._lm.ledger.records(**{name: value})
        except (TypeError, ValueError):  # as it documents
            return
        for record in found:
            if getattr(record, name) != value:
                raise invariants.Violation("filter", f"{name}={value!r} found {record}")

    def _budgeted(self, draws: Draws) -> None:
        """Two different callers never share an account; the same always does."""
        names = [self._text(draws) for _ in range(2)]
        scope = draws.pick(("tenant", "user", "tag:feature"))
        lm = self._fresh(f"b-{next(_made)}", budget=Budget(usd=1.0, scope=scope, name=self._text(draws) or None))
        (rule,) = lm.pipeline.budgets
        keys = []
        for name in names:
            context = {"tags": {"feature": name}} if scope == "tag:feature" else {scope: name}
            with call_context(**context) as here:  # type: ignore[arg-type]
                keys.append(rule.account(here, lm.model, time.time()).key)
        if (names[0] == names[1]) != (keys[0] == keys[1]):
            raise invariants.Violation("own account", f"{names!r} have {keys!r}")

    def _named(self, draws: Draws) -> None:
        namespace, model = self._name(draws), f"openai/{self._text(draws)}" if draws.one_in(2) else self._name(draws)
        lm = dspy_prod.LM(model, store=f"memory://n-{next(_made) % 50}", namespace=namespace, max_tokens=5)
        json.dumps(lm.dump_state())
        repr(lm)

    def _referred(self, draws: Draws) -> None:
        text = self._name(draws)
        reference = Reference.of(text)
        if Reference.of(str(reference)) != reference:
            raise invariants.Violation("reference", f"{text!r} is {reference!r}, and that is {str(reference)!r}")
        checked_name(text)
        predictor_prompt("program", encoded(text))

    def _command(self, draws: Draws) -> None:
        arguments = list(draws.pick(COMMANDS))
        for _ in range(draws.below(4)):
            arguments.append(draws.pick(OPTIONS) if draws.one_in(2) else self._text(draws).replace("\x00", ""))
        if any(word in ("--help", "-h") for word in arguments):
            return
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                main(arguments)
        except SystemExit as end:
            if not isinstance(end.code, (int, str, type(None))):
                raise invariants.Violation("command", f"{arguments!r} ended with {end.code!r}") from None
        if any(sign in out.getvalue() for sign in ("\x1b[31m", "\x9b", "\u202e", "Traceback")):
            raise invariants.Violation("visible", f"{arguments!r} printed {out.getvalue()[-500:]!r}")

    # -- details -----------------------------------------------------------------------------------------------------
    def _name(self, draws: Draws) -> Any:
        return draws.pick(STRANGERS) if draws.one_in(20) else self._text(draws)

    def _text(self, draws: Draws) -> str:
        return "".join([draws.pick(PARTS) for _ in range(1 + draws.below(4))])

    @staticmethod
    def _fresh(namespace: str, **more: Any) -> Any:
        engine = ScriptedEngine("ok")
        return dspy_prod.LM(
            "openai/names",
            engine=engine,
            async_engine=engine.asynchronous,
            max_tokens=10,
            prices={"openai/names": Price(input=1, output=1)},
            store=f"memory://names-{next(_made)}",
            namespace=namespace,
            **{"budget": Budget(usd=1_000, scope="tenant", name="tenants"), **more},
        )
