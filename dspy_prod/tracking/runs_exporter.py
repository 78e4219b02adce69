"""The process that writes runs to MLflow: reads messages from its input, and says what became of them.

Started by `runs.Runs`. One JSON object a line: first the configuration, then messages, perhaps `{"hurry": true}`. A
message is about one run, and makes it when there is none with its key yet:

- `run`: its key; `parent`: the key of the run that it is part of, or `under`: MLflow's id of that;
- `continues`: look for a run with these tags, and go on with it;
- `name`, `start` and `end` in milliseconds, `status` when it ends;
- `tags`, `params`: texts by name; `metrics`: `[name, value, step, milliseconds]` each; `adds`: names of those that are
  added to what the run had when it was found, because `continues` found it;
- `texts`: artifacts by path; `files`: artifacts in base64 by path; `tables`: artifacts as columns and data by path;
- `datasets`: `{"name", "digest", "context"}` each.

It answers `{"batch": n, "lost": 0 or 1, "ids": {key: id}}` for each, and `{"failing": why}` while MLflow cannot be
reached.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

from dspy_prod.tracking.exporter import Sink
from dspy_prod.tracking.exporting import Reader, serve, told

KEY: Final = "dspy_prod.key"
"""The tag by which a run is found again."""
BEFORE: Final = "dspy_prod.before"
"""The tag with what a run had come to before it was continued."""
_PARENT: Final = "mlflow.parentRunId"
_TABLES: Final = "mlflow.loggedArtifacts"
_MOST_PARAMS: Final = 100
"""Parameters that MLflow takes at once."""


class Records:
    """Writes runs into one experiment.

    Args:
        uri: MLflow's tracking URI. experiment: its name, made when there is none. ids: of the runs that it has.
    """

    def __init__(self, uri: str, experiment: str, ids: Mapping[str, str]) -> None:
        self._uri = uri
        self._sink = Sink(uri, experiment)
        self._opened: Any = None
        self.ids = dict(ids)
        self.new: dict[str, str] = {}
        self._search = bool(ids)  # another process may have made some that it could not tell of
        self._params: dict[str, set[str]] = {}
        self._before: dict[str, dict[str, float]] = {}
        self._ended: dict[str, tuple[str, int | None]] = {}

    def open(self) -> str:
        """Connect; the experiment's id."""
        return self._sink.open()

    def answers(self) -> bool:
        """Whether MLflow is there."""
        return self._sink.answers()

    def write(self, message: Mapping[str, Any]) -> None:
        """Write one message; again, if that failed, adds nothing twice."""
        try:
            self._write(message)
        except Exception:
            self._search = True  # a run that is not known may be there all the same
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
        if message.get("status"):
            status, end = self._ended.get(run, (None, None))
            client.set_terminated(run, message["status"], end if status == message["status"] else message.get("end"))

    def _run(self, message: Mapping[str, Any]) -> str:
        key = message["run"]
        if key not in self.ids:
            found = self._found(message)
            self.ids[key] = self.new[key] = self._made(message) if found is None else found
        return self.ids[key]

    def _found(self, message: Mapping[str, Any]) -> str | None:
        """A run that is there already: of this message, or one that is to be continued."""
        wanted = {KEY: message["run"]}
        if message.get("continues"):
            wanted = message["continues"]
        elif not self._search:
            return None
        if message.get("parent"):
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
        elif run.info.status != "RUNNING":
            self._client().update_run(run_id, status="RUNNING")
        return run_id

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
        above = self.ids.get(message["parent"]) if message.get("parent") else message.get("under")
        tags = {KEY: message["run"], **({_PARENT: above} if above else {})}
        made = self._client().create_run(
            self.open(), start_time=message.get("start"), tags=tags, run_name=message.get("name")
        )
        return str(made.info.run_id)

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


class Loop(Reader):
    """Takes messages from `lines` until they end."""

    def __init__(self, records: Records, answers: IO[str]) -> None:
        super().__init__(answers)
        self._records = records

    def run(self) -> None:
        """Write until the input ends."""
        try:
            self._records.open()
        except Exception as error:
            self._say(failing=told(error))
        while (message := self._lines.get()) is not None:
            failed = self._insist(partial(self._records.write, message), self._records.answers)
            new, self._records.new = self._records.new, {}
            lost = None if failed is None else failed[0]
            self._say(batch=message["batch"], lost=int(lost is not None), failing=lost, ids=new)


def _dataset(name: str, digest: str, context: str) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"name": name})
    return DatasetInput(Dataset(name, digest, "local", source), [InputTag("mlflow.data.context", context)])


def _quoted(value: str) -> str:
    return value.replace("'", "")


def main() -> None:
    """Body of the process. Reads `{"uri": ..., "experiment": ..., "patience": ..., "ids": ...}`, then messages."""
    serve(lambda config, answers: Loop(Records(config["uri"], config["experiment"], config["ids"]), answers))
