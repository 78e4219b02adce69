"""The process that writes runs to MLflow: reads messages from its input, and says what became of them.

Started by `runs.Runs`. One JSON object a line: first the configuration, then messages, perhaps `{"hurry": true}`. A
message is about one run, and makes it when there is none with its key yet:

- `run`: its key; `parent`: the key of the run that it is part of, or `under`: MLflow's id of that;
- `continues`: look for a run with these tags, and go on with it;
- `name`, `start` and `end` in milliseconds, `status` when it ends;
- `tags`, `params`: texts by name; `metrics`: `[name, value, step, milliseconds]` each; `adds`: names of those that are
  added to what the run had when it was found, because `continues` found it;
- `texts`: artifacts by path; `files`: artifacts in base64 by path; `tables`: artifacts as columns and data by path;
- `datasets`: `{"name", "digest", "context"}` each;
- `links`: traces that belong to the run, by `tr-...`;
- `open`: the run goes on if it had ended; `shared`: other processes may tell of the run by the same key.

A message without `run` is about no run: `feedback`: `{"id", "trace", "name", "value", "source", "who", "rationale",
"metadata", "at"}` each; or `assessments`, see there, which is answered under `ask`. Those four are for what the
exporter of traces writes too, see `messages`.

It answers `{"batch": n, "lost": 0 or 1, "ids": {key: id}}` for each, and `{"failing": why}` while MLflow cannot be
reached.
"""

from __future__ import annotations

from functools import partial
from typing import IO

from dspy_prod.tracking.exporting import Reader, serve, told
from dspy_prod.tracking.records import Records


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


def main() -> None:
    """Body of the process. Reads `{"uri": ..., "experiment": ..., "patience": ..., "ids": ...}`, then messages."""
    serve(lambda config, answers: Loop(Records(config["uri"], config["experiment"], config["ids"]), answers))
