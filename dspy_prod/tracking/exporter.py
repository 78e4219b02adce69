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
from functools import partial
from queue import Empty
from typing import IO, Any, Final

from dspy_prod.privacy.names import bare_url
from dspy_prod.tracking.exporting import Reader, serve, told
from dspy_prod.tracking.records import NotThere, Records
from dspy_prod.tracking.sink import Sink
from dspy_prod.tracking.tally import due

TOGETHER: Final = 6
"""Batches written in one go when they are there anyway."""


class Loop(Reader):
    """Takes batches from `lines` until they end."""

    def __init__(self, sink: Sink, answers: IO[str]) -> None:
        super().__init__(answers)
        self._sink = sink
        self._records = Records(sink.uri, sink.name, {}, sink)
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
        while (first := self._next()) is not None:
            batches = [first]
            with contextlib.suppress(Empty):
                while len(batches) < TOGETHER:
                    more = self._lines.get_nowait()
                    if more is None:
                        self._lines.put(None)
                        break
                    batches.append(more)
            self._deliver(batches)

    def _next(self) -> dict[str, Any] | None:
        """What is to be written next, None at the end. Until it comes, and then at last, links are made."""
        links, ended = self._sink.links, False
        while True:
            pause = links.pause()
            if ended and (pause is None or (pause and self._hurried.is_set())):
                return None
            try:
                found = self._lines.get(timeout=pause) if pause != 0 else self._lines.get_nowait()
                if found is not None:
                    return found
                ended = True
            except Empty:
                links.step()
                self._say(links=[links.asked, links.settled], failing=self._failing)

    def _deliver(self, batches: list[dict[str, Any]]) -> None:
        some = [batch for batch in batches if not batch.get("messages")]
        if some:
            self._traces(some)
        for batch in batches:
            if batch.get("messages"):
                self._messages(batch)

    def _messages(self, batch: dict[str, Any]) -> None:
        """Write what is told of runs and of feedback, one after the other."""
        records, refused, later, failing = self._records, {}, list[int](), None
        for place, message in enumerate(batch["messages"]):
            if batch["again"]:
                message["again"] = True
            failed = self._insist(partial(records.write, message), self._sink.answers)
            if failed is not None and failed[0].startswith(NotThere.__name__):
                later.append(place)
            elif failed is not None:
                refused[place], failing = failed[0], None if failed[1] else failed[0]
        (new, records.new), (answers, records.replies) = (records.new, {}), (records.replies, {})
        result = {"ids": new, "refused": refused, "later": later, "answers": answers}
        if new:
            result["experiment"] = records.open()
        self._settled(batch, 0, failing=failing, result=result)

    def _traces(self, batches: list[dict[str, Any]]) -> None:
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
        places, lines = (
            {key: one for batch in batches for key, one in batch[name].items()} for name in ("places", "lines")
        )
        self._sink.write(spans, infos, places, lines)
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
                lost += not self._try(spans, [], batch["places"], batch["lines"])
            for info in batch["infos"]:
                self._try([], [info], {})
            with contextlib.suppress(Exception):  # MLflow was there a moment ago, and the traces are
                self._sink.link(batch["runs"])
            lost = min(lost, batch["traces"])
            self._refused += lost
            self._settled(batch, lost)

    def _try(
        self,
        spans: list[dict[str, Any]],
        infos: list[dict[str, Any]],
        places: Mapping[str, str],
        lines: Mapping[str, str] | None = None,
    ) -> bool:
        try:
            self._sink.write(spans, infos, places, lines)
        except Exception as error:
            self._refusal = told(error)
            self._say(failing=self._refusal)
            return False
        return True

    def _settled(self, batch: dict[str, Any], lost: int, **words: Any) -> None:
        self._delivered += batch["traces"] - lost
        links = self._sink.links
        self._say(batch=batch["batch"], lost=lost, links=[links.asked, links.settled], **words)

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
