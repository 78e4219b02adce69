"""What is told of runs and of people's feedback while calls are served: it goes the way of the traces, after them.

On the courier's thread, but for `admits`. Messages are those that `runs_exporter` takes; of a trace that is not in
MLflow yet, because another process has written it or is about to, feedback is tried again for some time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from dspy_prod.privacy.outward import outward
from dspy_prod.tracking.batches import BATCH, LINGER, Batch
from dspy_prod.tracking.content import Content

MOST_WAITING: Final = 10_000
"""Messages that may wait for MLflow; further ones are lost, and counted."""
PATIENCE: Final = 120.0
"""Seconds after which feedback on a trace that never came is lost."""
_PAUSE: Final = (1.0, 20.0)
"""Shortest and longest time between two tries."""
_CONTENT: Final = ("rationale",)
"""What is left out where prompts and answers are."""

Message = dict[str, Any]


class Messages:
    """See the module's docstring.

    Args:
        content: how texts are shown.

    Attributes:
        ids: MLflow's id of each run that it has told of, by its key; experiment: that of the experiment they are in.
        answers: to messages that asked something, by their `ask`; None: MLflow refused. Whoever asked takes them out.
        lost: messages that were left out, or that MLflow refused; `refusal`: why, of the last one.
    """

    def __init__(self, content: Content) -> None:
        self._content = content
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.ids: dict[str, str] = {}
        self.experiment: str | None = None
        self.answers: dict[str, Any] = {}
        self.lost = 0
        self.refusal: str | None = None
        self._told = self._done = 0
        self._counting = threading.RLock()
        self._queue: list[Message] = []
        self._since = 0.0
        self._later: list[tuple[float, float, Message]] = []  # when it is tried again, after what pause

    @property
    def waiting(self) -> int:
        """How many are neither in MLflow nor lost."""
        return max(0, self._told - self._done - self.lost)

    @property
    def pending(self) -> bool:
        """Whether something will have to be sent without anything new coming."""
        return bool(self._queue or self._later)

    def admits(self) -> bool:
        """Whether one more may wait; counts it either way."""
        with self._counting:
            self._told += 1
            if self.waiting <= MOST_WAITING:
                return True
            self.lose(1, "too many wait for MLflow")
            return False

    def lose(self, count: int, why: str | None) -> None:
        """So many are lost."""
        if count:
            with self._counting:
                self.lost += count
                self.refusal = why

    def left_out(self) -> None:
        """One that was told needs not be sent."""
        self._done += 1

    def told(self, message: Message) -> None:
        """One more is to be sent."""
        if not self._queue:
            self._since = time.monotonic()
        self._queue.append(self._shown(message))

    def ready(self, now: float, number: Callable[[], int], at_once: bool = False) -> list[Batch]:
        """The batches to be written now, after those of the traces.

        Args:
            number: gives a batch its number. at_once: do not wait for company.
        """
        due = [each for each in self._later if at_once or each[0] <= now]
        if due:
            self._later = [each for each in self._later if each not in due]
            self._queue += [message for _, _, message in due]
        if not self._queue or not (at_once or len(self._queue) >= BATCH or now - self._since >= LINGER):
            return []
        queue, self._queue = self._queue, []
        return [
            Batch(number(), 0, [], [], messages=queue[start : start + BATCH], done=self._heard)
            for start in range(0, len(queue), BATCH)
        ]

    def _heard(self, batch: Batch, result: Mapping[str, Any] | None, why: str | None) -> None:
        """What became of a batch; without a result, all of it is lost. On the exporter's reader thread."""
        told = result or {}
        later, refused = set(told.get("later", ())), dict(told.get("refused", {}))
        self.ids.update(told.get("ids", {}))
        self.experiment = told.get("experiment", self.experiment)
        self.answers.update(told.get("answers", {}))
        for place, message in enumerate(batch.messages):
            if result is None or str(place) in refused:
                if "ask" in message:
                    self.answers[message["ask"]] = None
                self.lose(1, outward(str(refused.get(str(place), why))))
            elif place in later:
                self._postpone(message)
            else:
                self._done += 1

    def _postpone(self, message: Message) -> None:
        now = time.monotonic()
        began, pause = message.setdefault("_began", now), min(2 * message.get("_pause", _PAUSE[0] / 2), _PAUSE[1])
        if now - began > PATIENCE:
            self.lose(1, f"there is no trace {message['feedback'][0]['trace']}")
            return
        message["_pause"] = pause
        self._later.append((now + pause, pause, message))

    def _shown(self, message: Message) -> Message:
        """With texts as they may leave the process."""
        text, shown = self._content.text, dict(message)
        for name in ("tags", "params"):
            if name in shown:
                shown[name] = {key: text(outward(value)) for key, value in shown[name].items()}
        if "feedback" in shown:
            shown["feedback"] = [
                {key: None if key in _CONTENT and self._content.mode == "off" else self._clean(value)
                 for key, value in one.items()}
                for one in shown["feedback"]
            ]  # fmt: skip
        return shown

    def _clean(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._content.text(outward(value))
        return {key: self._clean(each) for key, each in value.items()} if isinstance(value, dict) else value
