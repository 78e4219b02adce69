"""Asking MLflow something without waiting for it: the exporter process looks, and the answer is there some time later.

While tracking is on, its exporter is asked; else a process of the same kind is started for the one who asks.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any, Final

from dspy_prod.runtime.forking import Stage, reset_after_fork
from dspy_prod.tracking import setup
from dspy_prod.tracking.courier import Courier
from dspy_prod.tracking.process import Exporter

_STEP: Final = 0.02
_OLDEST: Final = 300.0
"""Seconds after which an answer is not waited for any more: its process may have ended."""


class Questions:
    """One question at a time.

    Args:
        tracking_uri: of the MLflow that is asked while tracking is off; None: nobody is, then.
    """

    _exporter: Exporter | None = None
    _courier: Courier | None
    _asked: str | None
    _at: float
    _numbers: int
    _sent: dict[int, str]
    _own_answers: dict[str, Any]
    _failing: str | None

    def __init__(self, tracking_uri: str | None = None) -> None:
        self._uri = tracking_uri
        self._after_fork()
        reset_after_fork(self, Stage.THREADS)

    @property
    def open(self) -> bool:
        """Whether an answer is still to come."""
        if self._asked is not None and time.monotonic() - self._at > _OLDEST:
            self._asked = None
        return self._asked is not None

    def ask(self, message: Mapping[str, Any]) -> bool:
        """Ask, as `runs_exporter` says; whether there is anybody to be asked. Never waits.

        Raises:
            ConfigError: the URI is none that MLflow writes to.
        """
        key = uuid.uuid4().hex
        told = {**message, "ask": key}
        courier = setup.courier()
        if courier is not None:
            courier.tell(told)
        elif not self._tell_own(told):
            return False
        self._courier, self._asked, self._at = courier, key, time.monotonic()
        return True

    def answer(self, seconds: float = 0.0) -> Any:
        """What was answered, once; None while there is none, and when MLflow refused.

        Args:
            seconds: to wait for it; less when MLflow cannot be reached.
        """
        until = time.monotonic() + seconds
        while self.open and self._asked is not None:
            answers = self._own_answers if self._courier is None else self._courier.messages.answers
            key = self._asked
            if key in answers:
                self._asked = None
                return answers.pop(key)
            failing = self._failing if self._courier is None else self._courier.delivery.failing
            if failing is not None or time.monotonic() >= until:
                return None
            time.sleep(_STEP)
        return None

    def _tell_own(self, message: dict[str, Any]) -> bool:
        where = setup.place(self._uri)
        if where is None:
            return False
        if self._exporter is None or not self._exporter.alive:
            config = {"uri": where.uri, "experiment": where.experiment, "patience": where.exit_timeout}
            self._exporter = Exporter(config, self._heard, setup.environment_of(where.uri))
        self._numbers += 1
        self._exporter.tell({"batch": self._numbers, "traces": 0, "messages": [message], "again": False})
        self._sent[self._numbers] = message["ask"]
        return True

    def _heard(
        self, number: int | None = None, lost: int = 0, failing: str | None = None, *,
        result: Mapping[str, Any] | None = None, **_: Any,
    ) -> None:  # fmt: skip
        """What the process says; on its reader thread."""
        self._failing = failing
        if number is not None:
            ask = self._sent.pop(number, "")
            self._own_answers[ask] = (result or {}).get("answers", {}).get(ask)

    def _after_fork(self) -> None:
        if self._exporter is not None:
            self._exporter.forget()
        self._exporter = self._courier = self._asked = self._failing = None
        self._at, self._numbers = 0.0, 0
        self._sent, self._own_answers = {}, {}
