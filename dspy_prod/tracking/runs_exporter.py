"""The process that writes runs to MLflow: reads messages from its input, and says what became of them.

Started by `runs.Runs`. One JSON object a line: first the configuration, then messages, perhaps `{"hurry": true}`. A
message is about one run, and makes it when there is none with its key yet:

- `run`: its key; `parent`: the key of the run that it is part of, or `under`: MLflow's id of that;
- `continues`: look for a run with these tags, and go on with it;
- `name`, `start` and `end` in milliseconds, `status` when it ends;
- `tags`, `params`: texts by name; `metrics`: `[name, value, step, milliseconds]` each;
- `texts`: artifacts by path; `files`: artifacts in base64 by path; `tables`: artifacts as columns and data by path;
- `datasets`: `{"name", "digest", "context"}` each.

It answers `{"batch": n, "lost": 0 or 1, "ids": {key: id}}` for each, and `{"failing": why}` while MLflow cannot be
reached.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

from dspy_prod.tracking.exporter import BACK_OFF, PATIENCE, Reader, Sink, is_final, told, watch

KEY: Final = "dspy_prod.key"
"""The tag by which a run is found again."""
_PARENT: Final = "mlflow.parentRunId"
_TABLES: Final = "mlflow.loggedArtifacts"
_MOST_PARAMS: Final = 100


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

    def open(self) -> str:
        """Connect; the experiment's id."""
        return self._sink.open()

    def answers(self) -> bool:
        """Whether MLflow is there."""
        return self._sink.answers()

    def doubt(self) -> None:
        """Something failed: a run that is not known may be there all the same."""
        self._search = True

    def write(self, message: Mapping[str, Any]) -> None:
        """Write one message; again, if that failed, adds nothing twice."""
        from mlflow.entities import Metric, Param, RunTag

        run = self._run(message)
        known = self._params.setdefault(run, set())
        params = [Param(*one) for one in message.get("params", {}).items() if one[0] not in known]
        tags = [RunTag(*one) for one in message.get("tags", {}).items()]
        metrics = [Metric(name, value, at, step) for name, value, step, at in message.get("metrics", ())]
        client = self._client()
        if metrics or tags or params:
            client.log_batch(run, metrics=metrics, params=params[:_MOST_PARAMS], tags=tags)
            known.update(one.key for one in params)
        if message.get("datasets"):
            client.log_inputs(run, datasets=[_dataset(**one) for one in message["datasets"]])
        self._artifacts(run, message)
        if message.get("status"):
            client.set_terminated(run, message["status"], message.get("end"))

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
        if run.info.status != "RUNNING" and not message.get("status"):
            self._client().update_run(run_id, status="RUNNING")
        return run_id

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
        super().__init__()
        self._records = records
        self._answers = answers

    def run(self) -> None:
        """Write until the input ends."""
        try:
            self._records.open()
        except Exception as error:
            self._say(failing=told(error))
        while (message := self._lines.get()) is not None:
            lost = self._delivered(message)
            new, self._records.new = self._records.new, {}
            self._say(batch=message["batch"], lost=int(lost is not None), failing=lost, ids=new)

    def _delivered(self, message: dict[str, Any]) -> str | None:
        """None once it is written; why not, when it never will be."""
        pause, failures = BACK_OFF[0], 0
        while True:
            try:
                self._records.write(message)
            except Exception as error:
                failures += 1
                self._records.doubt()
                why = told(error)
                hurried = self._hurried.is_set()
                if hurried or is_final(error) or (failures >= PATIENCE and self._records.answers()):
                    return why
                self._say(failing=why)
                self._hurried.wait(pause)
                pause = min(pause * 2, BACK_OFF[1])
            else:
                return None

    def _say(self, **words: Any) -> None:
        with contextlib.suppress(OSError):  # the program is gone; what it handed over is still to be written
            self._answers.write(json.dumps(words) + "\n")
            self._answers.flush()


def _dataset(name: str, digest: str, context: str) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"name": name})
    return DatasetInput(Dataset(name, digest, "local", source), [InputTag("mlflow.data.context", context)])


def _quoted(value: str) -> str:
    return value.replace("'", "")


def main() -> None:
    """Body of the process. Reads `{"uri": ..., "experiment": ..., "patience": ..., "ids": ...}`, then messages."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # sent to a whole group or container, these are for the program
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    logging.disable(logging.CRITICAL)
    first = sys.stdin.readline()
    if not first:
        return
    config = json.loads(first)
    loop = Loop(Records(config["uri"], config["experiment"], config["ids"]), answers)
    threading.Thread(target=watch, args=(config["parent"], config["patience"], lambda: None), daemon=True).start()
    threading.Thread(target=loop.read, args=(sys.stdin,), daemon=True).start()
    loop.run()
