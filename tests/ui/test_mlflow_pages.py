"""MLflow's pages in a real browser: a person sees what calls cost, who made them, and every attempt.

Pictures are kept in `$DSPY_PROD_SCREENSHOTS`, if set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ui.browser import Browser, chromium
from tests.ui.conftest import DRAFT, FINAL, LARGE, SMALL, Filled

_FOUND = chromium()
pytestmark = [
    pytest.mark.ui,
    pytest.mark.timeout(300),
    pytest.mark.skipif(_FOUND is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]

STORAGE = {
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",  # what a first visitor would have to close
    "mlflow.assistant.panelOpen_v1": "false",
    "mlflow.detectIssues.guidanceShown_v1": "true",
}
COLUMNS = '{"cost":true,"user":true,"tag:dspy_prod.status":true,"session":false,"state":false,"tags":false}'
"""Cost, user and status are columns that one can turn on: Display > Columns."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures go."""
    kept = os.environ.get("DSPY_PROD_SCREENSHOTS")
    path = Path(kept) if kept else tmp_path_factory.mktemp("pictures")
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="module")
def browser(experiment: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium that has been here before."""
    assert _FOUND is not None
    storage = {**STORAGE, f"mlflow.traces-v4.columns.{experiment}_v4": COLUMNS}
    with Browser(_FOUND, tmp_path_factory.mktemp("chromium"), width=1600, height=1000, storage=storage) as started:
        yield started


@pytest.fixture
def base(pages: str, experiment: str) -> str:
    """The address of the experiment's pages."""
    return f"{pages}/#/experiments/{experiment}"


def shown(usd: float, text: str) -> bool:
    """Whether a text that a page shows is this amount, as far as the page shows it: to 4 digits at least."""
    digits = len(text.partition(".")[2])
    return digits >= 4 and abs(float(text) - usd) <= 0.51 * 10**-digits


def test_the_overview_shows_the_cost_over_time_and_by_model(
    browser: Browser, base: str, filled: Filled, pictures: Path
) -> None:
    """Overview > Usage has the ledger's total in both charts, the share of each model, and the number of traces."""
    browser.resize(1600, 1700)
    browser.open(f"{base}/overview/usage?startTimeLabel=LAST_HOUR")
    browser.wait_for("Cost Breakdown", "Cost Over Time", SMALL)
    browser.picture(pictures / "overview.png")
    said = browser.text()
    browser.resize(1600, 1000)
    for chart in ("Cost Breakdown", "Cost Over Time"):
        [total] = re.findall(rf"{chart} \$([\d.]+) Total Cost", said)
        assert shown(filled.usd, total), (chart, total, filled.usd)
    for model in (LARGE, SMALL):
        [share] = re.findall(rf"{model} ?(\d+)%", said)
        assert int(share) == pytest.approx(100 * filled.usd_by_model()[model] / filled.usd, abs=1)
    assert re.search(r"Traces 6\b", said)


def test_the_list_of_traces_has_users_status_and_costs(
    browser: Browser, base: str, filled: Filled, pictures: Path
) -> None:
    """Each row of the Traces page shows the question, who asked, how it ended, and what it cost."""
    browser.open(f"{base}/traces")
    said = browser.wait_for("6 of 6", "Cost", "dspy_prod.status")
    browser.picture(pictures / "traces.png")
    for words in ("I was charged twice.", "A colleague will answer you.", "ann", "bob", "fallback", "cached"):
        assert words in said
    costs = sorted(float(found) for found in re.findall(r"\$([\d.]+)", said) if float(found))
    expected = sorted(usd for usd in filled.usd_by_trace().values() if usd)
    assert costs == pytest.approx(expected, abs=5.1e-7)


def test_what_was_no_ordinary_answer_is_seen_in_the_list(
    experiment: str, base: str, filled: Filled, pictures: Path, tmp_path: Path
) -> None:
    """To a visitor who has chosen no columns: the canned answer with its reason, and the other model's."""
    assert _FOUND is not None
    with Browser(_FOUND, tmp_path, width=1600, height=1000, storage=STORAGE) as visitor:
        visitor.open(f"{base}/traces")
        said = visitor.wait_for("6 of 6", "State")
        visitor.picture(pictures / "traces-first-visit.png")
    assert "fallback: upstream_error: A colleague will answer you." in said
    assert f'fallback to {SMALL}: {{"category":"billing","reply":"Thank you, we look into it."}}' in said
    assert said.count("fallback:") - said.count("dspy_prod.status: fallback") == 1
    assert said.count("fallback to ") == 1


def test_a_version_lists_its_traces(browser: Browser, base: str, filled: Filled, pictures: Path) -> None:
    """The page of prompts lists the program; on the program's page, one click shows the traces of the version."""
    browser.open(f"{base}/prompts")
    browser.wait_for("triage Version 2")
    browser.picture(pictures / "prompts.png")
    browser.open(f"{base}/prompts/triage")
    browser.wait_for("Viewing version 2")
    browser.run("[...document.querySelectorAll('button, label')].find(e => e.innerText.trim() === 'Traces').click()")
    said = browser.wait_for("Where is my parcel?", "I was charged twice.", "5 of 6")
    browser.picture(pictures / "version-traces.png")
    assert "hello" not in said.partition("Input")[2], "a call without a program is of no version"


def test_a_trace_shows_its_attempts_and_their_costs(
    browser: Browser, base: str, filled: Filled, pictures: Path
) -> None:
    """A trace's tree has the program, the LM's call and each attempt, with the cost where it arose."""
    browser.open(f"{base}/traces/{filled.fallen}")
    said = browser.wait_for("attempt 1", "attempt 2", "attempt 1 (triage-small)", "Where is my parcel?")
    browser.picture(pictures / "trace.png")
    assert "triage" in said
    tree = said[said.index("Spans triage") : said.index("attempt 1 (triage-small)") + 80]
    [cost] = re.findall(r"attempt 1 \(triage-small\).*?\$([\d.]+)", tree)
    assert shown(filled.usd_by_trace()[filled.fallen], cost)
    assert tree.count("$") == 1, "the attempts that failed cost nothing"


def test_a_failed_attempt_says_why(browser: Browser, base: str, filled: Filled, pictures: Path) -> None:
    """Clicking a failed attempt shows the error."""
    browser.open(f"{base}/traces/{filled.retried}")
    browser.click("attempt 1")
    said = browser.wait_for("exception.type", "LMServerError 500")
    browser.picture(pictures / "attempt.png")
    assert LARGE in said


def test_the_call_of_the_lm_reads_as_a_conversation(
    browser: Browser, base: str, filled: Filled, pictures: Path
) -> None:
    """The span of the LM shows the messages by role, and the answer."""
    browser.open(f"{base}/traces/{filled.retried}")
    browser.wait_for("attempt 2")
    browser.click(LARGE)
    browser.wait_for("System", "User", "Assistant", "Thank you, we look into it.")
    browser.picture(pictures / "messages.png")


def test_a_call_without_a_program_reads_as_a_conversation_too(
    browser: Browser, base: str, filled: Filled, pictures: Path
) -> None:
    """A bare `lm("hello")` is a trace whose question and answer stand in the list as they were said."""
    browser.open(f"{base}/traces/{filled.bare}")
    said = browser.wait_for("attempt 1", "User", "Assistant", "Thank you, we look into it.")
    browser.picture(pictures / "bare.png")
    assert "$" in said


def test_a_prompt_has_its_versions_and_aliases(browser: Browser, pages: str, pictures: Path) -> None:
    """The prompt's page lists both versions with aliases, and shows the newest one by role, its demo included."""
    browser.open(f"{pages}/#/prompts/triage")
    said = browser.wait_for("Viewing version 2", "See more")
    browser.picture(pictures / "prompt.png")
    assert re.search(r"Version 2 @ production .* Version 1 @ previous", said)
    for words in ("refined, with an example", "Model: triage-large", "Temperature: 0.2", "dspy_prod_adapter"):
        assert words in said
    conversation = r"System .* User .* My parcel never came\. Assistant .*shipping.* User .*\{\{message\}\}"
    assert re.search(conversation, said)
    browser.click("See more")
    browser.wait_for(FINAL)


def test_two_versions_can_be_compared(browser: Browser, pages: str, pictures: Path) -> None:
    """The comparison marks the words and the demo that the newer version has, and nothing else."""
    browser.resize(1600, 1100, 0.8)
    browser.open(f"{pages}/#/prompts/triage")
    browser.click("Compare")
    browser.click("Text")
    browser.click('[data-component-id="mlflow.prompts.details.switch_sides"]')
    said = browser.wait_for("Comparing version 1 with version 2", "@ previous", "@ production", DRAFT, FINAL)
    browser.picture(pictures / "comparison.png")
    browser.resize(1600, 1000)
    assert "as written" in said
    marked = browser.run(
        "[...document.querySelectorAll('span')].filter(e => e.style.backgroundColor || "
        "!['rgba(0, 0, 0, 0)', 'rgb(255, 255, 255)'].includes(getComputedStyle(e).backgroundColor))"
        ".map(e => e.innerText).join('')"
    )
    added = " ".join(marked.split())
    assert "in one friendly sentence" in added
    assert "My parcel never came." in added
    assert "Sort the" not in added
    assert "{{message}}" not in added


def test_a_trace_leads_to_the_prompt_that_made_it(browser: Browser, base: str, filled: Filled, pictures: Path) -> None:
    """A trace names the linked prompt and its version; the link leads to its page."""
    browser.open(f"{base}/traces/{filled.retried}")
    browser.click("1 linked prompt")
    browser.wait_for("Linked prompts triage Version 2")
    browser.picture(pictures / "linked.png")
    address = browser.run(
        "[...document.querySelectorAll('a')].map(a => a.href).find(a => a.includes('prompts/triage'))"
    )
    assert address.partition("?")[0] == f"{base}/prompts/triage"
    browser.open(address)
    browser.wait_for("Viewing version 2", "@ production", "@ previous")
