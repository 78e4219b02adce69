"""Writes runs, and feedback on traces, into one MLflow experiment. What messages hold: see `runs_exporter`."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from dspy_prod.tracking.assessments import OURS as FEEDBACK
from dspy_prod.tracking.assessments import assessments
from dspy_prod.tracking.exporting import status_of
from dspy_prod.tracking.sink import Sink

KEY: Final = "dspy_prod.key"
"""The tag by which a run is found again."""
BEFORE: Final = "dspy_prod.before"
"""The tag with what a run had come to before it was continued."""
_MOST_LINKS: Final = 100
_PARENT: Final = "mlflow.parentRunId"
_TABLES: Final = "mlflow.loggedArtifacts"
_MOST_PARAMS: Final = 100
"""Parameters that MLflow takes at once."""


class NotThere(Exception):
    """Feedback is about a trace that MLflow has not, or not yet."""

    def get_http_status_code(self) -> int:
        """Trying again at once is of no use."""
        return 410


class Records:
    """Writes runs into one experiment.

    Args:
        uri: MLflow's tracking URI. experiment: its name, made when there is none. ids: of the runs that it has.
        sink: who is connected to it already.
    """

    def __init__(self, uri: str, experiment: str, ids: Mapping[str, str], sink: Sink | None = None) -> None:
        self._uri = uri
        self._sink = sink or Sink(uri, experiment)
        self._opened: Any = None
        self.ids = dict(ids)
        self.new: dict[str, str] = {}
        self.replies: dict[str, Any] = {}  # to what was asked
        self._search = bool(ids)  # another process may have made some that it could not tell of
        self._params: dict[str, set[str]] = {}
        self._before: dict[str, dict[str, float]] = {}
        self._ended: dict[str, tuple[str, int | None]] = {}
        self._unsure: set[str] = set()  # feedback that may be there already

    def open(self) -> str:
        """Connect; the experiment's id."""
        return self._sink.open()

    def answers(self) -> bool:
        """Whether MLflow is there."""
        return self._sink.answers()

    def write(self, message: Mapping[str, Any]) -> None:
        """Write one message; again, if that failed, adds nothing twice."""
        try:
            if "run" in message:
                self._write(message)
            for one in message.get("feedback", ()):
                self._assess(one, bool(message.get("again")))
            if "assessments" in message:
                self.replies[message["ask"]] = assessments(self._client(), self.open(), message["assessments"])
        except Exception:
            self._search = True  # a run that is not known may be there all the same
            self._unsure.update(one["id"] for one in message.get("feedback", ()))
            raise

    def _write(self, message: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run = self._run(message)
        known = self._params.setdefault(run, set())
        params = [Param(*one) for one in message.get("params", {}).items() if one[0] not in known]
        tags = [RunTag(*one) for one in message.get("tags", {}).items()]
        before = self._earlier(run, message) if message.get("continues") and message.get("adds") else {}
        metrics = [
            Metric(name, value + before.get(name, 0.0), at, step)
            for name, value, step, at in message.get("metrics", ())
        ]
        client = self._client()
        if metrics or tags:
            client.log_batch(run, metrics=metrics, tags=tags)
        for first in range(0, len(params), _MOST_PARAMS):
            some = params[first : first + _MOST_PARAMS]
            client.log_batch(run, params=some)
            known.update(one.key for one in some)
        if message.get("datasets"):
            client.log_inputs(run, datasets=[_dataset(**one) for one in message["datasets"]])
        self._artifacts(run, message)
        for first in range(0, len(message.get("links", ())), _MOST_LINKS):
            client.link_traces_to_run(message["links"][first : first + _MOST_LINKS], run)
        if message.get("status"):
            status, end = self._ended.get(run, (None, None))
            client.set_terminated(run, message["status"], end if status == message["status"] else message.get("end"))

    def _run(self, message: Mapping[str, Any]) -> str:
        key = message["run"]
        if key in self.ids:
            if message.get("open"):
                self._client().update_run(self.ids[key], status="RUNNING")
            return self.ids[key]
        found = self._found(message) or self._made(message)
        if message.get("shared"):  # another process may have made it at the same moment: the older one holds
            found = self._oldest(found, message)
        self.ids[key] = self.new[key] = found
        return found

    def _oldest(self, made: str, message: Mapping[str, Any]) -> str:
        asked = f"tags.`{KEY}` = '{_quoted(message['run'])}'"
        found = self._client().search_runs([self.open()], asked, order_by=["attributes.start_time ASC"])
        oldest = min(found, key=lambda run: (run.info.start_time, run.info.run_id)).info.run_id if found else made
        if oldest != made:
            self._client().delete_run(made)
        return str(oldest)

    def _found(self, message: Mapping[str, Any]) -> str | None:
        """A run that is there already: of this message, or one that is to be continued."""
        wanted = {KEY: message["run"]}
        if message.get("continues"):
            wanted = message["continues"]
        elif not self._search and not message.get("shared"):
            return None
        if message.get("parent") and not message.get("shared"):
            wanted = {**wanted, _PARENT: self.ids.get(message["parent"], "")}
        asked = " and ".join(f"tags.`{name}` = '{_quoted(value)}'" for name, value in wanted.items())
        found = self._client().search_runs([self.open()], asked, max_results=1, order_by=["attributes.start_time DESC"])
        if not found:
            return None
        [run] = found
        run_id = str(run.info.run_id)
        self._params[run_id] = set(run.data.params)
        self._search = True  # it may have children
        if run.info.status != "RUNNING" and message.get("status"):
            self._ended[run_id] = (run.info.status, run.info.end_time)  # nothing of it is done again
        elif run.info.status != "RUNNING" and message.get("open", not message.get("shared")):
            self._client().update_run(run_id, status="RUNNING")
        return run_id

    def _assess(self, told: Mapping[str, Any], again: bool) -> None:
        """Add feedback to a trace, once.

        Raises:
            NotThere: MLflow has no such trace, yet.
        """
        from mlflow.entities import AssessmentSource, Feedback

        traces, trace = self._sink.traces(), told["trace"]
        metadata = {**(told.get("metadata") or {}), FEEDBACK: told["id"]}
        try:
            if (again or told["id"] in self._unsure) and any(
                (one.metadata or {}).get(FEEDBACK) == told["id"] for one in traces.get_trace_info(trace).assessments
            ):
                return
            source = AssessmentSource(told["source"].upper(), told.get("who") or "dspy_prod")
            its: dict[str, Any] = {
                "rationale": told.get("rationale"),
                "metadata": metadata,
                "create_time_ms": told.get("at"),
            }
            feedback = Feedback(told["name"], told["value"], source=source, trace_id=trace, **its)
            traces.log_assessment(trace, feedback)
        except Exception as error:
            if status_of(error) == 404:
                raise NotThere(trace) from error
            raise
        self._unsure.discard(told["id"])

    def _earlier(self, run: str, message: Mapping[str, Any]) -> dict[str, float]:
        """What earlier parts came to. A tag keeps it, so that another process of this part adds it but once."""
        if run not in self._before:
            data, part = self._client().get_run(run).data, message["run"].partition("/")[0]
            kept = json.loads(data.tags.get(BEFORE, "{}"))
            if kept.get("part") != part:
                own = data.tags.get(KEY) == message["run"]  # this part has made it
                had = {} if own else {name: data.metrics.get(name, 0.0) for name in message["adds"]}
                kept = {"part": part, "had": had}
                self._client().set_tag(run, BEFORE, json.dumps(kept))
            self._before[run] = kept["had"]
        return self._before[run]

    def _made(self, message: Mapping[str, Any]) -> str:
        above = self._above(message)
        tags = {KEY: message["run"], **({_PARENT: above} if above else {})}
        made = self._client().create_run(
            self.open(), start_time=message.get("start"), tags=tags, run_name=message.get("name")
        )
        return str(made.info.run_id)

    def _above(self, message: Mapping[str, Any]) -> str | None:
        """MLflow's id of the run that this one is part of."""
        key = message.get("parent")
        if not key:
            return message.get("under")
        if key not in self.ids and message.get("shared"):  # another process has told of that one
            return self._found({"run": key, "shared": True})
        return self.ids.get(key)

    def _artifacts(self, run: str, message: Mapping[str, Any]) -> None:
        client = self._client()
        contents = {path: text.encode() for path, text in message.get("texts", {}).items()}
        contents.update({path: base64.b64decode(data) for path, data in message.get("files", {}).items()})
        tables = message.get("tables", {})
        contents.update({path: json.dumps(table).encode() for path, table in tables.items()})
        with tempfile.TemporaryDirectory(prefix="dspy_prod-") as folder:
            for path, data in contents.items():
                place = Path(folder, PurePosixPath(path).name)
                place.write_bytes(data)
                above = str(PurePosixPath(path).parent)
                client.log_artifact(run, str(place), None if above == "." else above)
        if tables:  # else MLflow's pages do not know that it is a table
            client.set_tag(run, _TABLES, json.dumps([{"path": path, "type": "table"} for path in tables]))

    def _client(self) -> Any:
        if self._opened is None:
            from mlflow import MlflowClient

            self.open()
            self._opened = MlflowClient(self._uri)
        return self._opened


def _dataset(name: str, digest: str, context: str) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"name": name})
    return DatasetInput(Dataset(name, digest, "local", source), [InputTag("mlflow.data.context", context)])


def _quoted(value: str) -> str:
    return value.replace("'", "")
