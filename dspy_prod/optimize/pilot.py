"""A pilot: what a program's answers looked like on some examples, measured, for a rehearsal of what is to come."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Final, NamedTuple

import dspy
from dspy.utils.callback import BaseCallback

from dspy_prod.context.current import current, use
from dspy_prod.records import CallRecord

Kind = tuple[tuple[str, ...], tuple[str, ...]]
"""What tells predictors apart, whatever their instructions: the names of their input and of their output fields."""

CHARS_PER_TOKEN: Final = 4.0
"""Of a model that nobody has measured."""


class Answer(NamedTuple):
    """What a predictor answered.

    Attributes:
        kind: of which predictor. values: by output field; None where they could not be read. text: as the LM gave it.
    """

    kind: Kind
    values: Mapping[str, Any] | None
    text: str


@dataclass
class Played:
    """One example as the program answered it: the answers of its predictors in order, and the score."""

    answers: list[Answer] = field(default_factory=list)
    score: float | None = None


@dataclass
class Measured:
    """What one model was like: means of its calls, None where none was measured."""

    calls: int = 0
    chars_in: int = 0
    chars_out: int = 0
    records: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    nano: int = 0

    def add(self, record: CallRecord) -> None:
        """Count an attempt that was answered."""
        self.records += 1
        self.tokens_in += record.input_tokens or 0
        self.tokens_out += record.output_tokens or 0
        self.seconds += record.latency
        self.nano += record.cost_nano or 0

    def tokens(self, chars: int, *, out: bool = False) -> float:
        """Tokens of a text of so many characters."""
        seen, tokens = (self.chars_out, self.tokens_out) if out else (self.chars_in, self.tokens_in)
        if not (self.records and self.calls and seen and tokens):
            return chars / CHARS_PER_TOKEN
        return chars * (tokens / self.records) / (seen / self.calls)


class Pilot:
    """What was measured.

    Attributes:
        played: by example, see `key_of`. models: by model. others: answers to what was no predictor of the program.
        usd: what it cost.
    """

    def __init__(self) -> None:
        self.played: dict[str, Played] = {}
        self.models: dict[str, Measured] = defaultdict(Measured)
        self.others: dict[Kind, list[Answer]] = defaultdict(list)
        self.examples: list[Any] = []
        self.records: list[CallRecord] = []
        self._lock = threading.Lock()

    @property
    def usd(self) -> float:
        """What it cost, as the ledger has it."""
        return sum(record.cost_nano or 0 for record in self.records) / 1e9

    @property
    def accuracy(self) -> float:
        """The mean score of the program, between 0 and 1; where metrics tell more than 1, of the highest one seen."""
        scores = [each.score for each in self.played.values() if each.score is not None]
        return min(1.0, max(0.0, sum(scores) / len(scores) / self._full)) if scores else 0.5

    @property
    def good(self) -> float:
        """The score from which on an answer counts as a right one: half of a full one."""
        return 0.5 * self._full

    @property
    def _full(self) -> float:
        return max([1.0, *(each.score for each in self.played.values() if each.score is not None)])

    @property
    def kinds(self) -> set[Kind]:
        """The predictors of the program."""
        return {answer.kind for played in self.played.values() for answer in played.answers}

    def scored(self, results: Iterable[tuple[Any, Any, Any]]) -> None:
        """Take the scores of an evaluation: (example, prediction, score), as `EvaluationResult.results` has them."""
        for example, _, score in results:
            played = self.played.get(key_of(example.inputs().toDict()))
            if played is not None:
                played.score = number_of(score)

    def told(self, lm: Any, chars_in: int, chars_out: int) -> None:
        """Count one call of an LM."""
        with self._lock:
            measured = self.models[model_of(lm)]
            measured.calls += 1
            measured.chars_in += chars_in
            measured.chars_out += chars_out

    def measured(self, record: CallRecord) -> None:
        """Count what an attempt used and cost."""
        with self._lock:
            self.records.append(record)
            if record.outcome == "ok" and not record.cached:
                self.models[record.model].add(record)


@contextmanager
def recording(program: dspy.Module, examples: Iterable[Any]) -> Iterator[Pilot]:
    """Measure what a program does inside with these examples; then give the pilot their scores.

    Example:
        ```python
        with recording(program, devset) as pilot:
            result = evaluate(program)
        pilot.scored(result.results)
        ```
    """
    pilot = Pilot()
    pilot.examples = list(examples)
    known = {key_of(example.inputs().toDict()) for example in pilot.examples}
    collected: list[CallRecord] = []
    callbacks = [*(dspy.settings.callbacks or []), _Recorder(pilot, known)]
    with dspy.context(callbacks=callbacks), use(current()._replace(records=collected)):
        yield pilot
    outer = current().records
    for record in collected:
        pilot.measured(record)
        if outer is not None:
            outer.append(record)


_PLAYED: ContextVar[Played | None] = ContextVar("dspy_prod_played", default=None)
_ASKED: ContextVar[tuple[Kind, str] | None] = ContextVar("dspy_prod_asked", default=None)


class _Recorder(BaseCallback):
    """Writes into a pilot what happens."""

    def __init__(self, pilot: Pilot, known: set[str]) -> None:
        self._pilot, self._known = pilot, known
        self._open: dict[str, Any] = {}
        self._texts: dict[str, tuple[Any, int]] = {}

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if _PLAYED.get() is None:
            key = key_of(inputs.get("kwargs") or {})
            if key in self._known:
                played = Played()
                self._pilot.played.setdefault(key, played)
                self._open[call_id] = _PLAYED.set(played)

    def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        if self._open.pop(call_id, None) is not None:
            _PLAYED.set(None)

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        signature = inputs.get("signature")
        if signature is not None:
            _ASKED.set((kind_of(signature), ""))

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._texts[call_id] = instance, chars_of(inputs)

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        lm, chars = self._texts.pop(call_id, (None, 0))
        if lm is None or exception is not None:
            return
        text = text_of(outputs)
        self._pilot.told(lm, chars, len(text))
        asked = _ASKED.get()
        if asked is not None:
            _ASKED.set((asked[0], text))

    def on_adapter_parse_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        asked, played = _ASKED.get(), _PLAYED.get()
        if asked is None:
            return
        answer = Answer(asked[0], dict(outputs) if isinstance(outputs, Mapping) else None, asked[1])
        if exception is not None:  # another adapter asks again
            return
        _ASKED.set(None)
        if played is not None:
            played.answers.append(answer)
        else:
            self._pilot.others[answer.kind].append(answer)


def key_of(inputs: Mapping[str, Any]) -> str:
    """What identifies an example: its inputs."""
    return json.dumps({str(name): inputs[name] for name in sorted(inputs, key=str)}, default=repr, sort_keys=True)


def kind_of(signature: Any) -> Kind:
    """Which predictor a signature belongs to."""
    return tuple(signature.input_fields), tuple(signature.output_fields)


def model_of(lm: Any) -> str:
    """The name of an LM's model."""
    return str(getattr(lm, "model", type(lm).__name__))


def chars_of(inputs: Mapping[str, Any]) -> int:
    """Characters of the messages of a call."""
    kwargs = inputs.get("kwargs") or {}
    messages = inputs.get("messages") or kwargs.get("messages") or inputs.get("prompt") or inputs.get("request") or ""
    if isinstance(messages, str):
        return len(messages)
    if not isinstance(messages, list):
        return len(str(messages))
    return sum(len(str(each.get("content", ""))) if isinstance(each, Mapping) else len(str(each)) for each in messages)


def text_of(outputs: Any) -> str:
    """The text of what an LM gave."""
    if isinstance(outputs, str):
        return outputs
    if isinstance(outputs, list):
        return "".join(text_of(each) for each in outputs)
    if isinstance(outputs, Mapping):
        called = outputs.get("tool_calls")
        return str(outputs.get("text") or "") + (json.dumps(called, default=str) if called else "")
    return str(getattr(outputs, "text", None) or outputs)


def number_of(score: Any) -> float:
    """A score as a number, of a metric with feedback too; 0 where it is none."""
    try:
        number = float(getattr(score, "score", score))
    except (TypeError, ValueError):
        return 0.0
    return number if isfinite(number) else 0.0
