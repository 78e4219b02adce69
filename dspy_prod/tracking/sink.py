"""Writes traces into one MLflow experiment. In the exporter process, which alone imports MLflow to write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dspy_prod.tracking.attributes import OUTPUTS, REQUEST_ID, dumped
from dspy_prod.tracking.exporting import is_final, status_of
from dspy_prod.tracking.linking import LINKED, Links, tag_of
from dspy_prod.tracking.mlflow_schema import prepare


class Sink:
    """Writes to one experiment.

    Args:
        uri: MLflow's tracking URI. experiment: its name, made when there is none.

    Attributes:
        links: of traces to prompts, which are still to be made.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = uri
        self.name = experiment
        self._experiment: str | None = None
        self._client: Any = None
        self._mlflow: Any = None
        self.links = Links(lambda: self._mlflow, lambda: self._client.store)

    def open(self) -> str:
        """Connect; the experiment's id."""
        if self._experiment is None:
            from mlflow import MlflowClient
            from mlflow.tracing.client import TracingClient

            prepare(self.uri)
            client = MlflowClient(self.uri)
            found = client.get_experiment_by_name(self.name)
            self._experiment = client.create_experiment(self.name) if found is None else found.experiment_id
            self._client = TracingClient(self.uri)
            self._mlflow = client
        return self._experiment

    def traces(self) -> Any:
        """MLflow's client for traces."""
        self.open()
        return self._client

    def answers(self) -> bool:
        """Whether MLflow is there."""
        from mlflow import MlflowClient

        try:
            MlflowClient(self.uri).get_experiment(self.open())
        except Exception:  # whatever it is: it cannot be told from being away
            return False
        return True

    def write(
        self,
        spans: list[dict[str, Any]],
        infos: list[dict[str, Any]],
        places: Mapping[str, str],
        lines: Mapping[str, str] | None = None,
    ) -> None:
        """Write spans, and the headlines of traces that MLflow recorded; `places`, `lines`: see `batches.Batch`.

        MLflow's list shows as the answer what a root span gave back when it was written first.
        """
        from mlflow.entities import TraceInfo

        experiment = self.open()
        linked = self.links.completed(one for one in spans if one["parent_span_id"] is None)
        if lines:
            self._log([_as_line(one, lines) for one in spans if _has_line(one, lines)], places, experiment)
        self._log(spans, places, experiment)
        usual = {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": experiment}}
        for info in infos:
            tags = info.get("tags") or {}
            if LINKED in tags:
                linked[info["trace_id"]] = refs = self.links.refs(tags[LINKED])
                info = {**info, "tags": {**tags, LINKED: tag_of(refs)}}
            self._client.start_trace(TraceInfo.from_dict({"trace_location": usual, **info}))
        its = {json.loads(one["attributes"][REQUEST_ID]): places[one["trace_id"]] for one in spans
               if one["trace_id"] in places}  # fmt: skip
        self.links.add(linked, its, experiment)

    def _log(self, spans: list[dict[str, Any]], places: Mapping[str, str], usual: str) -> None:
        from mlflow.entities import Span

        by_place: dict[str, list[Any]] = {}
        for one in spans:
            by_place.setdefault(places.get(one["trace_id"], usual), []).append(Span.from_dict(one))
        for place, some in by_place.items():
            self._client.log_spans(place, some)

    def link(self, runs: Mapping[str, str]) -> None:
        """Put traces, by their ids, onto runs. One that is gone meanwhile, or takes none, has none."""
        from mlflow import MlflowClient

        for run in dict.fromkeys(runs.values()):
            try:
                MlflowClient(self.uri).link_traces_to_run([trace for trace, its in runs.items() if its == run], run)
            except Exception as error:
                if not is_final(error) and status_of(error) != 404:
                    raise


def _has_line(span: Mapping[str, Any], lines: Mapping[str, str]) -> bool:
    return span["parent_span_id"] is None and span["trace_id"] in lines


def _as_line(span: dict[str, Any], lines: Mapping[str, str]) -> dict[str, Any]:
    """A root span that gives back a line, in the form from which MLflow takes the text alone."""
    said = {"choices": [{"message": {"role": "assistant", "content": lines[span["trace_id"]]}}]}
    return {**span, "attributes": {**span["attributes"], OUTPUTS: dumped(said)}}
