"""What the processes that write to MLflow have in common: how they read, insist, answer, and end with the program.

One JSON object a line comes in: first the configuration, then messages, perhaps `{"hurry": true}`. Answers go out in
the same way. Such a process ends with its input: the program is gone then, whatever ended it, and what was handed over
has still to be written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from queue import Queue
from typing import IO, Any, Final

from dspy_prod.privacy.names import bare_url, said_of, secrets_in

BACK_OFF: Final = (0.5, 30.0)
"""Shortest and longest pause in seconds before MLflow is tried again."""
PATIENCE: Final = 3
"""Failures after which, if MLflow answers otherwise, what is written is to blame."""
_UNREADABLE: Final = (ValueError, TypeError, KeyError, OverflowError)


class Reader(ABC):
    """Takes messages from `lines` until they end.

    Args:
        answers: where the program reads what became of them.
    """

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self._hurried = threading.Event()
        self._lines: Queue[dict[str, Any] | None] = Queue(maxsize=64)

    @abstractmethod
    def run(self) -> None:
        """Write until the input ends."""

    def read(self, source: IO[str]) -> None:
        """Body of the reading thread."""
        for line in source:
            try:
                message = json.loads(line)
            except ValueError:
                continue  # cut off: the program was killed while it wrote
            if message.get("hurry"):
                self._hurried.set()
            else:
                self._lines.put(message)
        self._hurried.set()
        self._lines.put(None)

    def _insist(self, write: Callable[[], None], answers: Callable[[], bool]) -> tuple[str, bool] | None:
        """Write, and try again until that succeeds, MLflow refuses it, or there is no time for more.

        Args:
            write: writes; what fails halfway is written anew. answers: whether MLflow is there.

        Returns:
            None once it is written; else why it is not, and whether MLflow is there and refuses it.
        """
        pause, failures = BACK_OFF[0], 0
        while True:
            try:
                write()
            except Exception as error:
                failures += 1
                why, hurried = told(error), self._hurried.is_set()
                suspicious = hurried or failures >= PATIENCE or isinstance(error, _UNREADABLE)
                if is_final(error) or (suspicious and answers()):
                    return why, True
                self._say(failing=why)
                if hurried:
                    return why, False
                self._hurried.wait(pause)
                pause = min(pause * 2, BACK_OFF[1])
            else:
                return None

    def _say(self, **words: Any) -> None:
        """Answer the program."""
        with contextlib.suppress(OSError):  # it is gone; what it handed over is still to be written
            self._answers.write(json.dumps(words) + "\n")
            self._answers.flush()


def is_final(error: Exception) -> bool:
    """Whether trying again is of no use: MLflow was reached and refuses the content."""
    code = status_of(error)
    return code is not None and 400 <= code < 500 and code not in (401, 403, 404, 408, 429)


def status_of(error: Exception) -> int | None:
    """The HTTP status that MLflow would give for its error."""
    status = getattr(error, "get_http_status_code", None)
    return int(status()) if callable(status) else None


def told(error: Exception) -> str:
    """The beginning of an error's text, without a password that a URL in it or this process's environment holds."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    text = said_of("", text, secrets_in(dict(os.environ)))
    return " ".join(bare_url(word) if "://" in word else word for word in text.split(" "))[:200]


def serve(
    make: Callable[[Mapping[str, Any], IO[str]], Reader], ended: Callable[[Any, Mapping[str, Any]], None] | None = None
) -> None:
    """Body of the process.

    Args:
        make: the loop, of the configuration, and of where answers go.
        ended: called with both when the program is gone: once everything is written, or time is up.
    """
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
    loop = make(config, answers)

    def end() -> None:
        if ended is not None:
            ended(loop, config)

    watching = threading.Thread(target=_watch, args=(config["parent"], config["patience"], end), daemon=True)
    watching.start()
    threading.Thread(target=loop.read, args=(sys.stdin,), daemon=True).start()
    loop.run()
    end()


def _watch(parent: int, patience: float, end: Callable[[], None]) -> None:
    """End in time when the program is gone, also when somebody else still holds the other end of the input."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(patience)
    end()
    os._exit(0)
