"""The costs report in a real browser: on a desk, on a phone, and on paper."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspy_prod.records import CallRecord
from dspy_prod.status.costs_report import report
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.testing import FakeClock
from tests.ui.browser import Browser, chromium

_FOUND = chromium()
pytestmark = [
    pytest.mark.ui,
    pytest.mark.timeout(120),
    pytest.mark.skipif(_FOUND is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]

HOSTILE = "<script>document.title = 'run'</script>"
DAYS = 30


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report of a month, in which somebody has a hostile name."""
    clock = FakeClock(1_795_435_200.0)
    store = MemoryStore("support", clock=clock)
    users = [HOSTILE, "x" * 300, *(f"user-{number}" for number in range(20))]
    for number in range(DAYS * 24):
        store.append(CallRecord(
            id=f"r{number}", call_id="c", started_at=clock.time() - 86_400 * (number % DAYS),
            model=("openai/gpt-4o-mini", "openai/gpt-4o", HOSTILE)[number % 3], route="primary", attempt=1,
            outcome="ok", cost_nano=1_000_000 * (1 + number % 7), user=users[number % len(users)], tenant="acme",
            prompt_version=f"triage/{6 + (number % DAYS > 8)}", variant=("control", "cot")[number % 2],
        ))  # fmt: skip
    path = tmp_path_factory.mktemp("costs") / "costs.html"
    report(store, clock).to_html(path)
    return path.as_uri()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures go."""
    kept = os.environ.get("DSPY_PROD_SCREENSHOTS")
    path = Path(kept) if kept else tmp_path_factory.mktemp("pictures")
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert _FOUND is not None
    with Browser(_FOUND, tmp_path_factory.mktemp("chromium"), width=1200, height=2400) as started:
        yield started


def test_it_has_a_chart_of_each_and_runs_nothing(browser: Browser, page: str, pictures: Path) -> None:
    """Every bar is drawn, the legend has the dearest first, and a hostile name is a text."""
    browser.open(page)
    said = browser.wait_for("Cost per day by model", "Cost per day by version", "Costs by tenant", "(other)", HOSTILE)
    browser.picture(pictures / "costs.png")
    assert browser.run("document.title") != "run"
    assert browser.run("document.scripts.length") == 0
    assert browser.run("document.querySelectorAll('svg').length") == 5
    tenants = "[...document.querySelectorAll('figure')].find(e => e.innerText.includes('by tenant'))"
    assert browser.run(f"{tenants}.querySelectorAll('rect').length") == DAYS
    heights = browser.run(f"[...{tenants}.querySelectorAll('rect')].map(e => e.getBoundingClientRect().height)")
    assert min(heights) > 10
    assert browser.run(f"{tenants}.querySelector('title').textContent").startswith("2026-")
    assert said.index("triage/7 $") < said.index("triage/6 $")


def test_a_phone_shows_it_without_scrolling_aside(browser: Browser, page: str, pictures: Path) -> None:
    """Charts shrink, letters do not; only a wide table scrolls, by itself."""
    browser.resize(390, 3000)
    browser.open(page)
    browser.wait_for("Cost per day by model")
    browser.picture(pictures / "costs-phone.png")
    assert browser.run("document.documentElement.scrollWidth") <= 390
    sizes = browser.run("[...document.querySelectorAll('li, td')].map(e => parseFloat(getComputedStyle(e).fontSize))")
    assert min(sizes) >= 12
    browser.resize(1200, 2400)


def test_paper_shows_it_in_colours(browser: Browser, page: str, pictures: Path) -> None:
    """Bars and the legend's squares are printed, on white, and no chart is cut in two."""
    browser.open(page)
    browser.wait_for("Cost per day by model")
    browser._send("Emulation.setEmulatedMedia", media="print")
    browser.picture(pictures / "costs-print.png")
    square = "document.querySelector('figure li span')"
    assert browser.run(f"getComputedStyle({square}).printColorAdjust") == "exact"
    assert browser.run("getComputedStyle(document.querySelector('figure')).breakInside") == "avoid"
    assert browser.run("getComputedStyle(document.documentElement).colorScheme") == "light"
    browser._send("Emulation.setEmulatedMedia", media="")
