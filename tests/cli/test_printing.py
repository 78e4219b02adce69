"""What the commands print: numbers whole, names as they are, on any width and in any encoding."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod.cli import main
from dspy_prod.cli.printing import show
from dspy_prod.privacy.visible import visible
from dspy_prod.records import CallRecord
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.testing import ScriptedEngine
from dspy_prod.views import Table

MODELS = ("lm_studio/a-rather-long-name-of-a-model-large", "lm_studio/a-rather-long-name-of-a-model-small")
ODD = ("[x]", "[/dim]", "[bold]b[/bold]", ":bug:", "日本", "naïve → ∑", "\U0001f600")
STEERING = "\x1b[31mred"
TURNING = "user\u202e\x9b31mresu"
COMMANDS = (
    ["health"], ["budgets"], ["costs"], ["costs", "--by", "model"], ["costs", "--by", "user"],
    ["calls", "--limit", "100"],
    ["costs", "--since", "7d"], ["calls", "--since", "today", "--user", "[x]"],
)  # fmt: skip


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for a store whose models have long names, and whose users odd ones."""
    monkeypatch.delenv("COLUMNS", raising=False)
    namespace = "[name] :bug: 日本"
    store = SqliteStore(str(tmp_path / "[db].db"), namespace)
    made = {"route": "primary", "attempt": 1, "outcome": "ok", "started_at": time.time(), "cost_nano": 123_456_789_000}
    for number, user in enumerate((*ODD, STEERING, "a " * 100)):
        told = {"input_tokens": 123_456_789, "output_tokens": 98_765_432, "program": user, "model": MODELS[number % 2]}
        store.append(CallRecord(id=f"r{number}", call_id="c", user=user, **told, **made))
    store.close()
    return ["--store", f"sqlite:///{tmp_path}/[db].db", "--namespace", namespace]


class Pipe(io.TextIOWrapper):
    """A pipe in an encoding."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    def said(self) -> str:
        """What was written into it."""
        found: bytes = self.buffer.getvalue()  # type: ignore[attr-defined]
        return found.decode(self.encoding)


def said(monkeypatch: pytest.MonkeyPatch, arguments: list[str], encoding: str = "utf-8") -> str:
    """What a command writes into a pipe."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe := Pipe(encoding))
        assert main(arguments) == 0
    return pipe.said()


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_numbers_are_whole_on_any_width(where: list[str], columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns showed "0.0055…" as a sum, and the same "lm_stu…" for two models."""
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = said(monkeypatch, ["costs", "--by", "model", *where])
    assert "…" not in shown
    for number in ("617.283945", "493.827156", "1111.111101", "617283945", "493827160", "1111111101", "888888888"):
        assert re.search(rf"(?<!\d){re.escape(number)}(?!\d)", shown), number
    names = "".join(line.split()[0] for line in shown.splitlines() if line.strip())
    for model in MODELS:
        assert model in names
    assert "123.456789" in said(monkeypatch, ["calls", *where])


def test_a_pipe_gets_everything_on_one_line(where: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`dspy-prod costs --by model | grep large` finds the line with its numbers."""
    (line,) = [line for line in said(monkeypatch, ["costs", "--by", "model", *where]).splitlines() if MODELS[0] in line]
    assert line.split() == [MODELS[0], "617.283945", "0.000000", "5", "0", "0", "617283945", "493827160"]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii", "utf-16"])
def test_names_are_shown_as_they_are(
    where: list[str], command: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name with `[x]` was a MarkupError, and one that cp1252 lacks a UnicodeEncodeError."""
    shown = said(monkeypatch, [*command, *where], encoding)
    assert "[name] :bug: " in shown
    assert "\x1b" not in shown
    if "user" in command and "--by" in command:
        for name in ODD:
            assert name.encode(encoding, "backslashreplace").decode(encoding) in shown
        assert r"\x1b[31mred" in shown
    found = json.loads(said(monkeypatch, [*command, *where, "--json"], encoding))
    if "calls" in command and "--limit" in command:
        assert {record["user"] for record in found} >= {*ODD, STEERING}


def test_the_last_row_is_the_sum(where: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rows come to, to the last digit, in a table and not in JSON."""
    for by in ("user", "model", "day"):
        *_, last = said(monkeypatch, ["costs", "--by", by, *where]).rstrip().splitlines()
        assert last.split() == ["total", "1111.111101", "0.000000", "9", "0", "0", "1111111101", "888888888"]
        assert "total" not in said(monkeypatch, ["costs", "--by", by, *where, "--json"])


def test_a_table_says_nothing_of_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """Titles, heads and cells alike."""
    show(Table("[red]t[/]", ("[a]", "n"), [("[/b]", "1")], numbers=1, last=[(":bug:", "22")]), "[/line] :bug:")
    shown = capsys.readouterr().out
    for words in ("[red]t[/]", "[a]", "[/b]", ":bug:", "[/line] :bug:"):
        assert words in shown


BUDGET = "[/b] :bug: " + STEERING + " a-rather-long-name-of-a-budget"


@pytest.fixture
def spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for a store with a budget of which users with odd names have spent."""
    monkeypatch.delenv("COLUMNS", raising=False)
    store = f"sqlite:///{tmp_path}/spent.db"
    lm = dspy_prod.LM(
        "openai/m", engine=ScriptedEngine("a"), store=store, namespace="n", cache=False, max_tokens=9,
        prices={"openai/m": dspy_prod.Price(input=1, output=1234)},
        budget=dspy_prod.Budget(usd=123_456.789, per="month", scope="user", name=BUDGET),
    )  # fmt: skip
    for user in (*ODD, STEERING, "u" * 60):
        with dspy_prod.call_context(user=user):
            lm("q")
    lm.close()
    return ["budgets", "--store", store, "--namespace", "n"]


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
@pytest.mark.parametrize("columns", [None, 40, 80])
def test_budgets_are_shown_as_they_are(
    spent: list[str], columns: int | None, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe and 80 columns had cut them, `:bug:` was an insect, and a name could steer the terminal."""
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
    shown = said(monkeypatch, spent, encoding)
    assert "…" not in shown
    assert "\x1b" not in shown
    assert shown.count("123456.789") == len(ODD) + 2
    for account in json.loads(said(monkeypatch, [*spent, "--json"], encoding)):
        assert f"{account['spent_usd']:.9f}".rstrip("0") in shown
        assert f"{account['remaining_usd']:.9f}".rstrip("0") in shown
    whole = "".join(shown.split())
    for name in ODD if columns is None else ():
        assert "".join(name.encode(encoding, "backslashreplace").decode(encoding).split()) in whole
    if columns is None:
        assert shown.count(BUDGET.replace("\x1b", r"\x1b")) == len(ODD) + 2


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_what_a_check_finds_is_shown_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """Its table was cut in a pipe, and had emoji in the place of `:bug:`."""
    monkeypatch.delenv("COLUMNS", raising=False)
    path = tmp_path / "日本 [x] :bug:.toml"
    path.write_text('model = "any/[m] :bug: with-a-name-that-is-rather-long-for-a-model"\nstore = "nowhere [/]"\n')
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe := Pipe(encoding))
        assert main(["check", str(path)]) == 1
    shown = pipe.said()
    assert "[x] :bug:.toml" in shown
    (line,) = [line for line in shown.splitlines() if "fails" in line]
    assert "store='nowhere [/]' is no store URL" in line


def test_what_would_turn_the_text_round_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tables and JSON alike: `user\\u202e` made the rest of a line read backwards."""
    monkeypatch.delenv("COLUMNS", raising=False)
    store = SqliteStore(str(tmp_path / "s.db"), "n")
    row(store, "r", 0.0, user=TURNING)
    store.close()
    where = ["--store", f"sqlite:///{tmp_path}/s.db", "--namespace", "n"]
    for command in (["calls"], ["costs", "--by", "user"]):
        assert r"user\u202e\x9b31mresu" in said(monkeypatch, [*command, *where])
        assert not {"\u202e", "\x9b"} & set(text := said(monkeypatch, [*command, *where, "--json"]))
        assert [each.get("user") or each["value"] for each in json.loads(text)] == [TURNING]


ROWS = "eve\nbob   999.000000  0.000000      1       0       0        1000           0"
HIDDEN = ("al\u200bice", "al\xadice", "alice\U000e0041", "al\u200dice", "alice\ufe0f", "\u2060alice", "ali\u3164ce")


@pytest.fixture
def forged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for a store whose callers would add rows of their own, and pass for others."""
    monkeypatch.delenv("COLUMNS", raising=False)
    store = f"sqlite:///{tmp_path}/forged.db"
    lm = dspy_prod.LM(
        "openai/m", engine=ScriptedEngine("[[ ## a ## ]]\nyes"), store=store, namespace="n", cache=False, max_tokens=9,
        prices={"openai/m": dspy_prod.Price(input=1, output=1)},
        budget=dspy_prod.Budget(usd=100, scope="user", name="b\nrow"),
    )  # fmt: skip
    prod = dspy_prod.Production(dspy.Predict("q -> a"), name=ROWS)
    with dspy.context(lm=lm):
        for name in ("alice", ROWS, *HIDDEN):
            with dspy_prod.call_context(user=name, tenant=name, session=name):
                prod(q="x")
    lm.close()
    return ["--store", store, "--namespace", "n"]


@pytest.mark.parametrize(
    "command",
    [["calls"], ["costs", "--by", "user"], ["costs", "--by", "program"], ["budgets"], ["programs"],
     ["programs", "--by", "tenant"]],
    ids=" ".join,
)  # fmt: skip
def test_a_name_is_one_row_and_nobody_else_s(
    forged: list[str], command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line feed in a name began a row with figures of its own; what takes no room made two users look like one."""
    shown = said(monkeypatch, [*command, *forged])
    assert not [line for line in shown.splitlines() if line.strip().startswith(("bob", "row"))]
    if "user" in command or command in (["calls"], ["budgets"]):
        assert r"eve\nbob" in shown
        for name in HIDDEN:
            assert name not in shown
            assert visible(name) in shown
    text = said(monkeypatch, [*command, *forged, "--json"])
    assert json.loads(text)
    assert not [name for name in HIDDEN if name in text]


@pytest.mark.parametrize("name", ["می\u200cخواهم", "क्\u200dष", "❤\ufe0f", "❤\ufe0f x", "🏳\ufe0f\u200d🌈", "👩\u200d👧"])
def test_what_a_script_is_written_with_stays(name: str) -> None:
    """Persian, Hindi and emoji join letters by signs that take no room."""
    assert visible(name) == name


@pytest.mark.parametrize("name", ["a\u200d", "\u200cه", "ه\u200c", "ه\u200d\u200dه", "a\u200dه", "ه\u200da", "a\ufe0f"])
def test_signs_that_join_nothing_are_shown(name: str) -> None:
    assert not set("\u200c\u200d\ufe0f") & set(visible(name))


def test_a_mistake_of_ours_is_not_shown_as_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any ValueError, such as one out of the demo's inside, was told in one line as if an argument were wrong."""

    def demo(**given: object) -> int:
        raise ValueError("a mistake of ours")

    monkeypatch.setattr("dspy_prod.cli.demo.demo.demo", demo)
    with pytest.raises(ValueError, match="a mistake of ours"):
        main(["demo", "--no-mlflow"])


def row(store: SqliteStore, id: str, days: float, **more: Any) -> None:
    """A call that was made so many days ago."""
    at = time.time() - days * 86_400
    made = {"route": "primary", "attempt": 1, "outcome": "ok", "cost_nano": 1_000_000, "model": "any/m"}
    store.append(CallRecord(id=id, call_id="c", started_at=at, **made, **more))


@pytest.mark.parametrize(
    ("since", "costs", "calls"),
    [
        ("30m", {"now"}, {"now"}), ("7d", {"now", "week"}, {"now", "week"}), ("2w", {"now", "week", "old"}, None),
        ("today", {"now"}, {"now"}), ("2000-01-01", {"now", "week", "old"}, None), ("2999-01-01", set(), set()),
        ("2000-01-01T10:30:00+02:00", {"now", "week", "old"}, None), ("9999w", {"now", "week", "old"}, None),
    ],
)  # fmt: skip
def test_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, since: str, costs: set[str], calls: set[str] | None
) -> None:
    """A span or a date bounds sums and calls; sums are of whole days."""
    store = SqliteStore(str(tmp_path / "s.db"), "n")
    for name, days in (("now", 0.0), ("week", 6.5), ("old", 13.5)):
        row(store, name, days, user=name, estimated=True)
    store.close()
    where = ["--store", f"sqlite:///{tmp_path}/s.db", "--namespace", "n", "--since", since]
    rows = json.loads(said(monkeypatch, ["costs", "--by", "user", "--json", *where]))
    assert {each["value"] for each in rows} == costs
    for more in ([], ["--unconfirmed"]):
        records = json.loads(said(monkeypatch, ["calls", "--json", *more, *where]))
        assert {each["id"] for each in records} == (costs if calls is None else calls)
    by_day = json.loads(said(monkeypatch, ["costs", "--json", *where]))
    assert len(by_day) == len(costs)
    shown = said(monkeypatch, ["costs", *where])
    assert f"since {since}" in shown


@pytest.mark.parametrize(
    "since", ["", "7", "d", "-7d", "7 days", "tomorrow", "2026-13-01", "12345w", "[x]", "9999-12-31T23:00-05:00"]
)
@pytest.mark.parametrize("command", ["costs", "calls"])
def test_a_since_that_means_nothing_is_refused(
    command: str, since: str, where: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The message shows what it can be."""
    assert main([command, f"--since={since}", *where]) == 2
    assert f"--since {since!r}: use 7d" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["health"], ["costs"], ["costs", "--by", "day"], ["calls"], ["calls", "--json"]])
def test_a_namespace_that_is_not_there_is_said(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt one showed zeros with exit code 0, and was there from then on."""
    path = tmp_path / "a b%25[x].db"
    url = f"sqlite:///{tmp_path}/a b%2525[x].db"
    SqliteStore(str(path), "alpha").close()
    SqliteStore(str(path), "[beta]").close()
    for _ in range(2):
        assert main([*command, "--store", url, "--namespace", "alhpa"]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert "no namespace 'alhpa'" in told.err
        assert "only '[beta]', 'alpha'; pass --namespace" in told.err
    assert main([*command, "--store", url, "--namespace", "alpha"]) == 0


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`dspy-prod --version`."""
    import dspy_prod

    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"dspy-prod {dspy_prod.__version__}\n"


@pytest.mark.parametrize("sign", ["\u202e", "\x9b", "\x1b[31m"])
def test_what_a_command_cannot_use_is_shown_as_what_it_is(capsys: pytest.CaptureFixture[str], sign: str) -> None:
    """An argument that nobody knows was repeated on the screen as it stood, and steered it."""
    with pytest.raises(SystemExit):
        main(["costs", f"a{sign}b"])
    said = capsys.readouterr().err
    assert sign not in said
    assert f"a{visible(sign)}b" in said
