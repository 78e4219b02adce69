"""The view of a run while it goes on, at a real terminal, in a file, and in a real notebook."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dspy_prod.optimize.candidates import Candidate, Progress
from dspy_prod.optimize.live import LINE_EVERY, Bar, Lines, Silent, watcher
from dspy_prod.optimize.live_page import MOST, chart, page, table
from dspy_prod.optimize.telling import sentence, used


def candidate(index: int, score: float | None, usd: float) -> Candidate:
    """A candidate with a score, found when so many dollars were spent."""
    status: Any = "unfinished" if score is None else "complete"
    return Candidate(index, f"key {index}", f"trial {index}", status, score=score, found_usd=usd, examples=60)


def progress(spent: float = 0.01, **more: Any) -> Progress:
    """How far a run is."""
    best = candidate(2, 0.7, 0.008)
    given: dict[str, Any] = {
        "candidates": (candidate(0, 0.5, 0.001), candidate(1, None, 0.0), best), "best": best, "baseline": 0.5,
        "budget_usd": 0.04, "eta": 200.0,
    }  # fmt: skip
    return Progress("triage", "MIPROv2", "search", 61.0, spent, 300, 50_000, **{**given, **more})


class Terminal:
    """A real terminal in the place of standard error, and what a person at it has read."""

    def __init__(self) -> None:
        self._mine, theirs = pty.openpty()
        self.resize(40, 160)
        self.file = os.fdopen(theirs, "w")

    def open(self, patch: pytest.MonkeyPatch) -> None:
        """From here on it is standard error; pytest puts its own there when the test begins."""
        patch.setattr(sys, "stderr", self.file)

    def resize(self, rows: int, columns: int) -> None:
        """Make the window another size."""
        fcntl.ioctl(self._mine, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self) -> str:
        """Everything written since the last time."""
        self.file.flush()
        os.set_blocking(self._mine, False)
        found = b""
        while True:
            try:
                found += os.read(self._mine, 65536)
            except BlockingIOError:
                return found.decode()

    def close(self) -> None:
        self.file.close()
        os.close(self._mine)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    made = Terminal()
    yield made
    monkeypatch.undo()
    made.close()


def test_at_a_terminal_it_is_one_bar_with_score_money_candidates_and_time(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.open(monkeypatch)
    shown = watcher("auto")
    assert isinstance(shown, Bar)
    shown.begin(progress(0.0, candidates=(), best=None, baseline=None, eta=None))
    begun = terminal.read()
    assert "triage" in begun
    assert "0%" in begun
    shown.update(progress())
    told = terminal.read()
    assert "25%" in told
    for part in ("best 0.700 (given 0.500)", "$0.01 of $0.04", "3 candidates", "3 min left"):
        assert part in told
    assert "| search, best" in told, "a comma stood between the bar and the words"
    assert "\n" not in begun + told  # it stays on its line
    shown.end(progress(0.04, stopped_by="budget"), None)
    ended = terminal.read()
    assert "100%" in ended
    assert "ended: budget" in ended
    assert ended.count("\n") == 1


def test_a_terminal_that_does_not_know_its_size_shows_the_bar(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.open(monkeypatch)
    terminal.resize(0, 0)
    shown = Bar()
    shown.begin(progress())
    assert "best 0.700" in terminal.read()
    shown.end(progress(), None)


def test_the_bar_never_goes_back(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal.open(monkeypatch)
    shown = Bar()
    shown.begin(progress(0.02))
    terminal.read()
    shown.update(progress(0.02, budget_usd=0.08))  # the reserve was freed
    assert "50%" in terminal.read()
    shown.end(progress(0.02), None)


def test_a_terminal_is_asked_for_by_name_or_by_itself_and_a_file_gets_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    terminal.open(monkeypatch)
    assert isinstance(watcher("table"), Bar)  # there is no notebook
    assert isinstance(watcher("log"), Lines)
    assert isinstance(watcher(None), Silent)
    with (tmp_path / "log").open("w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        assert isinstance(watcher("auto"), Lines)
        assert isinstance(watcher("bar"), Bar)


def test_lines_come_for_a_better_candidate_a_wait_and_a_phase_and_not_between(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = Lines()
    first = progress(0.001, best=candidate(0, 0.5, 0.001))
    shown.begin(first)
    for spent in (0.002, 0.003, 0.004):
        shown.update(progress(spent, best=first.best))
    assert len(lines(capsys)) == 1
    shown.update(progress())
    better = lines(capsys)
    assert len(better) == 1
    assert better[0].startswith("triage: search, best 0.700 (given 0.500), $0.01 of $0.04")
    shown.update(progress(waiting="an outage of openai/x"))
    assert "waiting for an outage of openai/x" in lines(capsys)[0]
    shown.end(progress(stopped_by="completed"), None)
    assert "ended: completed" in lines(capsys)[0]


def test_a_line_comes_after_ten_quiet_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("dspy_prod.optimize.live.time.monotonic", lambda: now[0])
    shown = Lines()
    shown.begin(progress())
    now[0] += LINE_EVERY - 0.1
    shown.update(progress())
    assert len(lines(capsys)) == 1
    now[0] += 0.2
    shown.update(progress())
    assert len(lines(capsys)) == 1


def test_nothing_is_shown_when_nothing_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    shown = watcher(None)
    shown.begin(progress())
    shown.update(progress())
    shown.end(progress(), None)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("caps", "share"),
    [
        ({"budget_usd": 0.04}, 0.25),
        ({"budget_usd": 0.04, "max_calls": 400}, 0.75),
        ({"budget_usd": None, "max_tokens": 100_000}, 0.5),
        ({"budget_usd": None, "max_time": 60.0}, 1.0),
        ({"budget_usd": None}, 0.0),
        ({"budget_usd": 10.0, "stopped_by": "completed"}, 1.0),
    ],
)
def test_the_cap_that_is_used_most_counts(caps: dict[str, Any], share: float) -> None:
    assert used(progress(**caps)) == pytest.approx(share)


def test_a_run_without_a_cap_on_dollars_tells_what_is_capped() -> None:
    told = sentence(progress(budget_usd=None, max_calls=1000, max_tokens=90_000, eta=None, replayed=12))
    assert told == (
        "search, best 0.700 (given 0.500), $0.01, 300 of 1,000 calls, 50,000 of 90,000 tokens, 3 candidates, "
        "12 calls replayed, 61 s"
    )


def test_the_page_has_the_best_first_and_escapes_what_it_tells() -> None:
    odd = Candidate(3, "odd", "<script>alert(1)</script>", "complete", score=0.9, found_usd=0.009)
    told = page(progress(candidates=(candidate(0, 0.5, 0.001), odd), best=odd))
    assert "<script>" not in told
    assert told.index("0.9") < told.index("trial 0")
    assert "<svg" in told


def test_the_page_stays_short_however_many_candidates_there_are() -> None:
    many = tuple(candidate(index, index / 100, index / 10_000) for index in range(50))
    shown = table(progress(candidates=many, best=many[-1]))
    assert len(shown.cells) == MOST
    assert "42 more candidates are not shown" in shown.caption
    assert shown.cells[0][0].text == "49"


def test_the_chart_has_a_dot_for_each_complete_candidate_and_none_while_there_is_none() -> None:
    assert chart(progress(candidates=(candidate(1, None, 0.0),), best=None)) == ""
    assert chart(progress()).count("<circle") == 2
    alone = chart(progress(candidates=(candidate(0, 0.5, 0.0),), spent=0.0, budget_usd=None))
    assert "nan" not in alone
    assert alone.count("<circle") == 1


def test_a_cap_that_is_far_away_does_not_push_the_chart_into_a_corner() -> None:
    """The rest of the chart was one line at its left; a cap that is near stands at the right end."""

    def last_dot(shown: str) -> float:
        return max(float(at) for at in re.findall(r'<circle cx="([0-9.]+)"', shown))

    assert last_dot(chart(progress(budget_usd=100.0))) > 300
    assert "$0.01, cap $100 further right" in chart(progress(budget_usd=100.0))
    assert "cap $0.02<" in chart(progress(budget_usd=0.02))
    assert "cap $0.02<" in chart(progress(0.0, candidates=(candidate(0, 0.5, 0.0),), budget_usd=0.02))


def test_what_stands_at_the_chart_s_scores_can_be_read() -> None:
    """Two names of scores that are near each other lay on one another, and long ones were cut."""
    near = (candidate(0, 0.6, 0.001), candidate(1, 0.601, 0.002), candidate(2, 0.2, 0.003))
    shown = re.findall(r'text-anchor="end"[^>]*>([^<]*)<', chart(progress(candidates=near, best=near[1])))
    assert shown[:2] == ["0.2", "0.601"]
    large = (candidate(0, 7407.4, 0.001), candidate(1, 12139.9, 0.002))
    assert {"7,407", "12,140"} <= set(re.findall(r">([^<>]+)</text>", chart(progress(candidates=large))))
    assert "stroke-dasharray" in chart(progress())


def test_nothing_in_a_name_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Lines()
    shown.begin(replace(progress(), run="tri\x1b[31mage"))
    assert "\x1b" not in (text := capsys.readouterr().err)
    assert r"tri\x1b[31mage" in text


NOTEBOOK = """
import threading
from dspy_prod.optimize.live import watcher
from dspy_prod.optimize.live_page import LivePage
from tests.optimize.live.test_live import progress
shown = watcher("auto")
assert isinstance(shown, LivePage), shown
shown.begin(progress(0.001, candidates=(), best=None))
thread = threading.Thread(target=lambda: shown._show(progress(0.02)))
thread.start(); thread.join()
shown.end(progress(0.04, stopped_by="budget"), None)
"""


def test_in_a_notebook_one_display_changes_in_place_also_from_a_thread() -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    manager = pytest.importorskip("jupyter_client.manager").AsyncKernelManager(kernel_name="python3")
    manager.kernel_spec.argv[0] = sys.executable
    seen: list[str] = []

    class Client(nbclient.NotebookClient):  # type: ignore[misc]
        def process_message(self, message: Any, cell: Any, index: int) -> Any:
            if message["msg_type"] in ("display_data", "update_display_data"):
                seen.append(message["msg_type"])
            return super().process_message(message, cell, index)

    root = Path(__file__).parents[3]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    Client(notebook, km=manager, timeout=120, resources={"metadata": {"path": str(root)}}).execute()
    outputs = notebook.cells[0].outputs
    shown = [each for each in outputs if each.output_type == "display_data"]
    assert len(shown) == 1, outputs
    assert "ended: budget" in shown[0]["data"]["text/html"]
    assert "ended: budget" in shown[0]["data"]["text/plain"], "a console of the kernel showed the name of a class"
    assert seen == ["display_data", "update_display_data", "update_display_data"]


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines written to standard error since the last time."""
    return capsys.readouterr().err.splitlines()
