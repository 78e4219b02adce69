"""The demo's traces in MLflow: turned on before it, and held against the ledger after it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from rich.console import Console
from rich.markup import escape

from dspy_prod.privacy.error_text import error_text
from dspy_prod.records import NANO, CallRecord
from dspy_prod.views import Cell, Table

EXPERIMENT: Final = "triage-demo"
PATIENCE: Final = 120.0
"""Seconds for which the end of the demo waits for MLflow; making a new database takes some."""
PATIENCE_FAILING: Final = 20.0
"""The same while MLflow cannot be written to."""
_STEP: Final = 2.0
TOLERANCE: Final = 1e-9
"""USD by which the sums may differ: MLflow keeps floats."""
_PAGE: Final = 500


@dataclass(frozen=True)
class Written:
    """What became of the demo's traces.

    Attributes:
        uri: where they went. experiment: MLflow's id of the experiment, None when it could not be asked.
        exported, waiting, lost: traces, as `tracking.status()` counts them.
        found: traces of this demo that MLflow returns. usd: the sum of their costs.
        ledger_usd: the sum of the ledger's records of this demo.
        failing: why MLflow could not be written or read, None when it could.
    """

    uri: str
    experiment: str | None
    exported: int
    waiting: int
    lost: int
    found: int
    usd: float | None
    ledger_usd: float
    failing: str | None

    @property
    def complete(self) -> bool:
        """Whether every trace arrived, so that the sums can be compared."""
        return not self.waiting and not self.lost and self.usd is not None

    @property
    def agrees(self) -> bool:
        """False only when every trace arrived and yet the sums differ."""
        return not self.complete or abs((self.usd or 0.0) - self.ledger_usd) <= TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-friendly values."""
        return {**asdict(self), "complete": self.complete, "agrees": self.agrees}


def begin(console: Console, uri: str | None) -> bool:
    """Turn tracking on; False, with a line that says why, when it stays off.

    Args:
        uri: MLflow's tracking URI, None to leave it off.

    Raises:
        ConfigError: a URI that MLflow cannot write traces to.
    """
    if uri is None:
        return False
    if find_spec("mlflow") is None:
        console.print("MLflow is not installed (pip install 'dspy-prod\\[mlflow]'): the demo goes on without it.")
        return False
    from dspy_prod import tracking

    tracking.enable(EXPERIMENT, tracking_uri=uri)
    return True


def end() -> None:
    """Turn tracking off. Does nothing when it is off."""
    from dspy_prod import tracking

    tracking.disable()


def written(console: Console, uri: str, records: Sequence[CallRecord], since: float) -> Written:
    """Wait, within a bound, until the traces are in MLflow, and add up what it says they cost.

    Args:
        uri: as for `begin`. records: the ledger's, of this demo. since: seconds since the epoch when it began.
    """
    from dspy_prod import tracking

    console.print("Writing the traces to MLflow ...")
    began = time.monotonic()
    while True:
        arrived = tracking.flush(_STEP)
        status = tracking.status()
        assert status is not None, "tracking was turned on by begin()"
        waited = time.monotonic() - began
        if arrived or waited > PATIENCE or (status.failing and waited > PATIENCE_FAILING):
            break
    experiment, found, dollars, failing = None, 0, None, status.failing
    if status.exported:
        try:
            experiment, found, dollars = _read(uri, since)
        except Exception as error:  # MLflow's own trouble must not end the demo
            failing = error_text(error)
    ledger = sum(record.cost_nano or 0 for record in records) / NANO
    return Written(
        status.uri, experiment, status.exported, status.waiting, status.lost, found, dollars, ledger, failing
    )


def _read(uri: str, since: float) -> tuple[str | None, int, float]:
    """The experiment's id, and how many traces began since then and what they cost in USD."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return None, 0, 0.0
    found, nano, token = 0, 0, None
    while True:
        page = client.search_traces(
            locations=[experiment.experiment_id],
            filter_string=f"timestamp_ms >= {int(since * 1000)}",
            max_results=_PAGE,
            page_token=token,
            include_spans=False,
        )
        found += len(page)
        nano += sum(round(trace.info.cost["total_cost"] * NANO) for trace in page if trace.info.cost)
        token = page.token
        if not token:
            return str(experiment.experiment_id), found, nano / NANO


def table(result: Written) -> Table:
    """What became of the traces, as a table."""
    agree = Cell("yes", "good") if result.agrees else Cell("NO", "bad")
    missing = [(name, Cell(str(count), "warn")) for name, count in (
        ("  still waiting", result.waiting), ("  lost", result.lost)
    ) if count]  # fmt: skip
    return Table("Ledger against MLflow", ("", ""), [
        ("traces written", str(result.exported)),
        *missing,
        *([("trouble", result.failing)] if result.failing else []),
        ("ledger, USD", f"{result.ledger_usd:.9f}"),
        ("sum of the traces' costs, USD", "unknown" if result.usd is None else f"{result.usd:.9f}"),
        ("agree", agree if result.complete else "n/a: not every trace arrived"),
    ])  # fmt: skip


def invitation(result: Written, prompt: str | None = None) -> str:
    """How to look at them, in rich's markup.

    Args:
        result: what was written. prompt: the version that ran, such as `"triage/2"`, None when none was published.
    """
    uri = escape(result.uri)
    if uri.startswith(("http://", "https://")):
        base, start = uri.rstrip("/"), "Open:"
    else:
        here = result.uri == f"sqlite:///{Path.cwd() / 'mlflow.db'}"
        command = f"mlflow ui --backend-store-uri {'sqlite:///mlflow.db' if here else uri}"
        base = "http://127.0.0.1:5000"
        start = (
            f"Start [bold]make ui[/] (or {command}), then open:" if here else f"Start [bold]{command}[/], then open:"
        )
    where = f"{base}/#/experiments/{quote(result.experiment or '')}"
    columns = "choose Cost, User and dspy_prod.status at Display > Columns"
    lines = [
        f"\nSee it in MLflow, experiment {EXPERIMENT!r}. {start}",
        f"  {where}/overview/usage?startTimeLabel=LAST_HOUR",
        "    cost over time and by model",
        f"  {where}/traces",
        f"    what each call cost and who made it ({columns}); open one to see its attempts",
    ]
    if prompt is not None:
        name, _, version = prompt.rpartition("/")
        lines += [
            f"  {where}/prompts/{quote(name)}",
            f"    the prompts: version {version} ran (alias production); Compare > Text shows what it changed",
        ]
    return "\n".join(lines)
