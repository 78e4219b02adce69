"""An experiment in MLflow's pages in a real browser: from a variant's figures to its failing traces in two clicks, and
a link that opens two variants side by side.

Pictures are kept in `$DSPY_PROD_SCREENSHOTS`, if set.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dspy
import pytest
from mlflow import MlflowClient

import dspy_prod
from dspy_prod import Experiment, Judge, Metric, call_context, call_report, tracking
from dspy_prod.testing import Provider
from tests.experiments.conftest import Triage
from tests.registry.processes import MlflowServer
from tests.ui.browser import Browser, chromium
from tests.ui.test_mlflow_pages import STORAGE

_FOUND = chromium()
pytestmark = [
    pytest.mark.ui,
    pytest.mark.timeout(300),
    pytest.mark.skipif(_FOUND is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]

EXPERIMENT = "support"
USERS = 100


@dataclass(frozen=True)
class Compared:
    """What was written.

    Attributes:
        database: MLflow's file. experiment: MLflow's id. runs: by variant.
        traces: (trace, whether it was resolved) of each variant. message: what each asked. url: of the scorecard.
    """

    database: Path
    experiment: str
    runs: dict[str, str]
    traces: dict[str, list[tuple[str, bool]]]
    message: dict[str, str]
    url: str


@pytest.fixture(scope="module")
def compared(schema: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Two variants, of which one resolves more."""
    folder = tmp_path_factory.mktemp("experiment-ui")
    database = Path(shutil.copy(schema, folder / "mlflow.db"))
    tracking.enable(EXPERIMENT, tracking_uri=f"sqlite:///{database}", content="full")
    traces: dict[str, list[tuple[str, bool]]] = {"control": [], "cot": []}
    message = {}
    with Provider(answer=lambda call: f"[[ ## label ## ]]\n{'billing' if 'twice' in str(call.body) else 'shipping'}"
                  "\n\n[[ ## completed ## ]]") as provider:  # fmt: skip
        lm = dspy_prod.LM("openai/gpt-4o-mini", api_base=provider.url, api_key="k", store="memory://experiment-ui")
        with dspy.context(lm=lm):
            exp = Experiment(
                "triage-cot",
                variants={"control": Triage(), "cot": Triage("Think first, step by step, then say the label.")},
                metrics=[Metric("resolved", margin=0.02), Metric("quality", judge="untrusted")],
                judges={"quality": Judge(lambda example, prediction: len(example.message) % 3 / 2, share=1.0)},
                store="memory://experiment-ui",
            )
            for number in range(USERS):
                asked = f"{'I was charged twice' if number % 2 else 'Where is my parcel'}, order {number}?"
                with call_context(user=f"user-{number}"):
                    report = call_report(exp(message=asked))
                variant, trace = str(report.variant), str(report.trace_id)
                resolved = len(traces[variant]) % (5 if variant == "control" else 10) != 3
                traces[variant].append((trace, resolved))
                message[trace] = asked
                exp.record(trace=trace, resolved=resolved)
                if number % 10 == 9:
                    exp.step()
            assert exp._works.judges is not None
            assert exp._works.judges.wait()
            exp.step()
            assert tracking.flush(110.0), tracking.status()
            exp.step()
    url = str(exp.scorecard().url)
    tracking.disable()
    client = MlflowClient(f"sqlite:///{database}")
    place = client.get_experiment_by_name(EXPERIMENT).experiment_id
    runs = {run.data.tags["dspy_prod.variant"]: run.info.run_id for run in client.search_runs([place])}
    return Compared(database, place, runs, traces, message, url)


@pytest.fixture(scope="module")
def server(compared: Compared) -> Iterator[str]:
    """The address of an MLflow server on it."""
    running = MlflowServer(compared.database)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        running.start()
    try:
        yield running.uri
    finally:
        running.kill()


@pytest.fixture(scope="module")
def browser(compared: Compared, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert _FOUND is not None
    with Browser(_FOUND, tmp_path_factory.mktemp("chromium"), width=1600, height=1000, storage=STORAGE) as started:
        yield started


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = os.environ.get("DSPY_PROD_SCREENSHOTS")
    path = Path(kept) if kept else tmp_path_factory.mktemp("pictures")
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_two_clicks_from_a_variant_s_figures_to_its_failing_traces(
    browser: Browser, server: str, compared: Compared, pictures: Path
) -> None:
    """The page of evaluation runs has both; a click on one has its traces, one more those that were not resolved."""
    browser.open(f"{server}/#/experiments/{compared.experiment}/evaluation-runs")
    browser.wait_for("control (triage-cot)", "cot (triage-cot)")
    browser.picture(pictures / "fb_runs.png")
    browser.click("control (triage-cot)")
    whole = len(compared.traces["control"])
    browser.wait_for("TRUE", f"{whole} of {whole}")
    browser.picture(pictures / "fb_run.png")
    browser.click("False")
    failing = {trace for trace, resolved in compared.traces["control"] if not resolved}
    said = browser.wait_for(f"{len(failing)} of {whole}", *[compared.message[trace] for trace in failing])
    browser.picture(pictures / "fb_failing.png")
    shown = {trace for trace, asked in compared.message.items() if asked in said}
    assert shown == failing, "exactly those"


def test_the_scorecard_s_link_opens_the_comparison(
    browser: Browser, server: str, compared: Compared, pictures: Path
) -> None:
    path = compared.url.partition("/#/")[2]
    assert path == (
        f"experiments/{compared.experiment}/evaluation-runs"
        f"?selectedRunUuid={compared.runs['cot']}&compareToRunUuid={compared.runs['control']}"
    )
    browser.open(f"{server}/#/{path}")
    resolved = [resolved for _, resolved in compared.traces["cot"]]
    share = round(100 * sum(resolved) / len(resolved))
    browser.wait_for(
        "quality",
        re.compile(r"Comparing (#\w+ )?cot \(triage-cot\) to (#\w+ )?control \(triage-cot\)"),
        re.compile(rf"resolved TRUE {share}% [+-]\d+%"),
    )
    browser.picture(pictures / "fb_compare.png")
