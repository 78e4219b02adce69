"""The exporter process: reads batches from its input, writes them to MLflow, and says what became of them.

Started by `process.Exporter`. The only place that imports MLflow to write traces. One JSON object a line: first the
configuration, then batches, perhaps `{"hurry": true}`; it answers `{"ready": true}` when it has reached MLflow,
`{"batch": n, "lost": k}` for each batch, and `{"failing": why}` while MLflow cannot be reached. What is missing when it
ends (see `exporting`) it tells the program's `stderr`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from queue import Empty
from typing import IO, Any, Final

from dspy_prod.privacy.names import bare_url
from dspy_prod.tracking.exporting import Reader, is_final, serve, status_of, told
from dspy_prod.tracking.mlflow_schema import prepare
from dspy_prod.tracking.tally import due

TOGETHER: Final = 6
"""Batches written in one go when they are there anyway."""


class Sink:
    """Writes to one experiment.

    Args:
        uri: MLflow's tracking URI. experiment: its name, made when there is none.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        self._uri = uri
        self._name = experiment
        self._experiment: str | None = None
        self._client: Any = None

    def open(self) -> str:
        """Connect; the experiment's id."""
        if self._experiment is None:
            from mlflow import MlflowClient
            from mlflow.tracing.client import TracingClient

            prepare(self._uri)
            client = MlflowClient(self._uri)
            found = client.get_experiment_by_name(self._name)
            self._experiment = client.create_experiment(self._name) if found is None else found.experiment_id
            self._client = TracingClient(self._uri)
        return self._experiment

    def answers(self) -> bool:
        """Whether MLflow is there."""
        from mlflow import MlflowClient

        try:
            MlflowClient(self._uri).get_experiment(self.open())
        except Exception:  # whatever it is: it cannot be told from being away
            return False
        return True

    def write(self, spans: list[dict[str, Any]], infos: list[dict[str, Any]], places: Mapping[str, str]) -> None:
        """Write spans, and the headlines of traces that MLflow recorded; `places`: see `traces.Batch`."""
        from mlflow.entities import Span, TraceInfo

        experiment = self.open()
        by_place: dict[str, list[Any]] = {}
        for one in spans:
            by_place.setdefault(places.get(one["trace_id"], experiment), []).append(Span.from_dict(one))
        for place, some in by_place.items():
            self._client.log_spans(place, some)
        usual = {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": experiment}}
        for info in infos:
            self._client.start_trace(TraceInfo.from_dict({"trace_location": usual, **info}))

    def link(self, runs: Mapping[str, str]) -> None:
        """Put traces, by their ids, onto runs. One that is gone meanwhile, or takes none, has none."""
        from mlflow import MlflowClient

        for run in dict.fromkeys(runs.values()):
            try:
                MlflowClient(self._uri).link_traces_to_run([trace for trace, its in runs.items() if its == run], run)
            except Exception as error:
                if not is_final(error) and status_of(error) != 404:
                    raise


class Loop(Reader):
    """Takes batches from `lines` until they end."""

    def __init__(self, sink: Sink, answers: IO[str]) -> None:
        super().__init__(answers)
        self._sink = sink
        self._failing: str | None = None
        self._delivered = self._refused = 0
        self._refusal = ""

    def run(self) -> None:
        """Reach MLflow, so that the first batch finds it ready (else that tries again); write until the input ends."""
        try:
            self._sink.open()
        except Exception as error:
            self._say(failing=told(error))
        else:
            self._say(ready=True)
        while (first := self._lines.get()) is not None:
            batches = [first]
            with contextlib.suppress(Empty):
                while len(batches) < TOGETHER:
                    more = self._lines.get_nowait()
                    if more is None:
                        self._lines.put(None)
                        break
                    batches.append(more)
            self._deliver(batches)

    def _deliver(self, batches: list[dict[str, Any]]) -> None:
        failed = self._insist(lambda: self._write(batches), self._sink.answers)
        if failed is not None and failed[1]:
            self._singly(batches)
            return
        for batch in batches:
            if failed is None:
                self._settled(batch, 0)
            else:
                self._settled(batch, batch["traces"], failing=failed[0])

    def _write(self, batches: list[dict[str, Any]]) -> None:
        spans, infos = ([one for batch in batches for one in batch[name]] for name in ("spans", "infos"))
        self._sink.write(spans, infos, {key: place for batch in batches for key, place in batch["places"].items()})
        for batch in batches:
            self._sink.link(batch["runs"])

    def _singly(self, batches: list[dict[str, Any]]) -> None:
        """MLflow refuses something in these: find out which traces, and write the rest."""
        for batch in batches:
            by_trace: dict[str, list[dict[str, Any]]] = {}
            for one in batch["spans"]:
                by_trace.setdefault(one["trace_id"], []).append(one)
            lost = 0
            for spans in by_trace.values():
                lost += not self._try(spans, [], batch["places"])
            for info in batch["infos"]:
                self._try([], [info], {})
            with contextlib.suppress(Exception):  # MLflow was there a moment ago, and the traces are
                self._sink.link(batch["runs"])
            lost = min(lost, batch["traces"])
            self._refused += lost
            self._settled(batch, lost)

    def _try(self, spans: list[dict[str, Any]], infos: list[dict[str, Any]], places: Mapping[str, str]) -> bool:
        try:
            self._sink.write(spans, infos, places)
        except Exception as error:
            self._refusal = told(error)
            self._say(failing=self._refusal)
            return False
        return True

    def _settled(self, batch: dict[str, Any], lost: int, **words: Any) -> None:
        self._delivered += batch["traces"] - lost
        self._say(batch=batch["batch"], lost=lost, **words)

    def _say(self, **words: Any) -> None:
        self._failing = words.get("failing")
        super()._say(**words)

    def last_word(self, file: int | None, place: str) -> str:
        """What a person has to know once the program is gone; empty when every trace is in MLflow.

        Args:
            file: descriptor of the `Tally`'s memory. place: where MLflow is.
        """
        missing = (due(file) or 0) - self._delivered
        if missing <= 0:
            return ""
        why = [f"MLflow refused {self._refused}: {self._refusal}"] if self._refused else []
        if missing > self._refused:
            why.append(self._failing or "the program was ended before they were handed over")
        return f"{missing} traces did not reach MLflow at {place} ({'; '.join(why)}). The ledger has their costs"


def main() -> None:
    """Body of the process. Reads `{"uri": ..., "experiment": ..., ...}`, then batches."""

    def ended(loop: Loop, config: Mapping[str, Any]) -> None:
        word = loop.last_word(config["tally"], bare_url(config["uri"]))
        if word and config["aloud"] is not None:
            with contextlib.suppress(OSError):
                os.write(config["aloud"], f"dspy_prod: {word}\n".encode("utf-8", "replace"))

    serve(lambda config, answers: Loop(Sink(config["uri"], config["experiment"]), answers), ended)
