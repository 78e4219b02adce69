"""MLflow's pages of an optimization in a real browser: its candidates stand side by side.

Pictures are kept in `$DSPY_PROD_SCREENSHOTS`, if set.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

import dspy
import pytest
from mlflow import MlflowClient

import dspy_prod
from benchmarks.world import World
from dspy_prod import tracking
from dspy_prod.optimize.report import OptimizationReport
from dspy_prod.tracking import runs
from tests.registry.processes import MlflowServer
from tests.ui.browser import Browser, chromium
from tests.ui.test_mlflow_pages import STORAGE

_FOUND = chromium()
pytestmark = [
    pytest.mark.ui,
    pytest.mark.timeout(300),
    pytest.mark.skipif(_FOUND is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]

METRICS: Final = ("score", "predicted", "usd_per_1000", "cost_usd", "tokens", "latency_s", "demos")
COLUMNS: Final = (*(f"metrics.`{name}`" for name in METRICS), "params.`prompt`", "tags.`dspy_prod.status`")
"""What a person turns on under "Columns"."""
SORTED: Final = f"orderByKey={quote('metrics.`score`')}&orderByAsc=false&startTime=ALL&lifecycleFilter=Active"


@dataclass(frozen=True)
class Kept:
    """An optimization in a store behind a server.

    Attributes:
        base: address of the experiment's pages. experiment, run: MLflow's ids. report: what it found.
    """

    base: str
    experiment: str
    run: str
    report: OptimizationReport


@pytest.fixture(scope="module")
def kept(schema: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    """A small, real optimization, kept in MLflow."""
    folder = tmp_path_factory.mktemp("optimization")
    database = Path(shutil.copy(schema, folder / "mlflow.db"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        tracking.enable("support", tracking_uri=f"sqlite:///{database}")
        try:
            with World(seed=3, val=60, dear=True) as world, dspy.context(lm=world.lm()):
                optimizer = dspy.MIPROv2(
                    metric=world.metric, prompt_model=world.prompt_lm(), auto=None, num_candidates=5, num_threads=6,
                    max_bootstrapped_demos=3, max_labeled_demos=3, seed=1,
                )  # fmt: skip
                best = dspy_prod.BudgetedOptimizer(
                    optimizer, budget_usd=0.5, name="triage", racing=0.9, view=None, store="memory://side-by-side"
                ).compile(world.program(), trainset=world.trainset, valset=world.valset, num_trials=14, minibatch=False)
            assert runs.flush(100.0)
        finally:
            tracking.disable()
        client = MlflowClient(f"sqlite:///{database}")
        experiment = client.get_experiment_by_name("support")
        assert experiment is not None
        [run] = client.search_runs([experiment.experiment_id], "tags.`dspy_prod.optimization` = 'triage'")
        server = MlflowServer(database)
        server.start()
    try:
        base = f"{server.uri}/#/experiments/{experiment.experiment_id}"
        yield Kept(base, experiment.experiment_id, run.info.run_id, best.optimization)
    finally:
        server.kill()


@pytest.fixture(scope="module")
def browser(kept: Kept, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium of somebody who has chosen his columns."""
    assert _FOUND is not None
    chosen = {
        "selectedColumns": COLUMNS, "runsHiddenMode": "SHOWALL", "runsExpanded": {kept.run: True},
        "orderByKey": "metrics.`score`", "orderByAsc": False, "startTime": "ALL", "lifecycleFilter": "Active",
        "datasetsFilter": [], "modelVersionFilter": "All Runs", "columnOrder": [], "columnWidths": {},
        "runsPinned": [], "runsHidden": [], "runsVisibilityMap": {}, "searchFilter": "", "groupBy": None,
        "groupsExpanded": {}, "hideEmptyCharts": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }  # fmt: skip
    name = f'MLflowLocalStorage-1.1-ExperimentPage-["{kept.experiment}"]-ReactComponentState'
    storage = {**STORAGE, name: json.dumps(chosen)}
    with Browser(_FOUND, tmp_path_factory.mktemp("chromium"), width=1760, height=640, storage=storage) as started:
        yield started


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures go."""
    folder = os.environ.get("DSPY_PROD_SCREENSHOTS")
    path = Path(folder) if folder else tmp_path_factory.mktemp("pictures")
    path.mkdir(parents=True, exist_ok=True)
    return path


def side_by_side(kept: Kept, mode: str = "") -> str:
    """The address of the list of candidates, best first."""
    below = quote(f"tags.mlflow.parentRunId = '{kept.run}'")
    return f"{kept.base}/runs?{mode}searchFilter={below}&{SORTED}&modelVersionFilter=All+Runs&datasetsFilter=W10%3D"


def test_candidates_stand_side_by_side(browser: Browser, kept: Kept, pictures: Path) -> None:
    """The table has a row a candidate, best first, with score, cost, tokens, latency, and how its prompt begins."""
    browser.open(side_by_side(kept))
    shown = [one for one in kept.report.candidates if one.status != "minibatch"]
    best = kept.report.best
    assert best is not None
    said = browser.wait_for(f"{len(shown)} matching runs", "cost_usd", "latency_s", f"#{best.index} {best.origin}")
    browser.picture(pictures / "mlflow-candidates.png")
    for one in shown:
        assert f"#{one.index} {one.origin}" in said
        if one.score is not None:
            assert f"{round(one.score, 4):.6g}" in said
    order = [int(number) for number in re.findall(r"#(\d+) (?:trial|given)", said)]
    assert order[0] == best.index
    assert "Sort the" in said


def test_candidates_stand_side_by_side_in_charts(browser: Browser, kept: Kept, pictures: Path) -> None:
    """The charts have a bar a candidate, beside each other, whatever numbers it had meanwhile."""
    browser.resize(1760, 1300)  # charts below the window are not drawn
    browser.open(side_by_side(kept, "compareRunsMode=CHART&"))
    browser.wait_for("Model metrics", "cost_usd", "score", "usd_per_1000")
    plots = "[...document.querySelectorAll('.js-plotly-plot')]"
    count = f"Math.max(0, ...{plots}.map(e => e.querySelectorAll('.bars .point').length))"
    scored = len([one for one in kept.report.candidates if one.status != "minibatch"])
    until = time.monotonic() + 60.0
    while (bars := browser.run(count)) < scored and time.monotonic() < until:
        time.sleep(0.2)
    browser.picture(pictures / "mlflow-charts.png")
    assert bars == scored


def test_the_run_says_what_came_of_it(browser: Browser, kept: Kept, pictures: Path) -> None:
    """Its page has the outcome in words, the metrics, and the candidates below it."""
    browser.open(f"{kept.base}/runs/{kept.run}")
    best = kept.report.best
    assert best is not None
    browser.wait_for("Best program:", f"#{best.index}", "Spent:", "expected_score", "Child runs", "Finished")
    browser.picture(pictures / "mlflow-optimization.png")


def test_its_figures_are_shown(browser: Browser, kept: Kept, pictures: Path) -> None:
    """The picture of score against dollars is an artifact that the page shows."""
    browser.open(f"{kept.base}/runs/{kept.run}/artifacts")
    browser.wait_for("score_against_dollars.png", "quality_against_cost.png", "report.html")
    browser.click("score_against_dollars.png")
    browser.picture(pictures / "mlflow-figure.png")
    width = browser.run("Math.max(0, ...[...document.querySelectorAll('img')].map(e => e.naturalWidth))")
    assert width >= 600
