"""Traces in the making: spans by trace until the root has ended, then batches. Pure but for the clock passed in."""

from __future__ import annotations

import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

from dspy_prod.context.assignments import Assignment, outer_tags
from dspy_prod.privacy.error_text import error_text
from dspy_prod.records import CallRecord
from dspy_prod.telemetry.tap import Way
from dspy_prod.tracking.asking import Predictors
from dspy_prod.tracking.attributes import INPUTS, MESSAGES, OUTPUTS, TAG, TYPE, dumped
from dspy_prod.tracking.batches import BATCH, LINGER, Batch, Trace, batch_of
from dspy_prod.tracking.calls import LeanNode
from dspy_prod.tracking.content import Content
from dspy_prod.tracking.endings import line_of, reason_of, status_of
from dspy_prod.tracking.sampling import Sampler
from dspy_prod.tracking.spans import (
    HEADLINES,
    attempt_attributes,
    attempt_error,
    attempt_name,
    chat,
    input_nano,
    known,
    record_span_id,
    span,
    tags_of,
    tokens,
    trace_attributes,
    whose,
)
from dspy_prod.tracking.variant_runs import Links

_log = logging.getLogger("dspy_prod")

PATIENCE: Final = 900.0
"""Seconds after which a trace is shipped although its root has not ended."""
_REMEMBERED: Final = 5_000
_COST: Final = "mlflow.trace.cost"
_USAGE: Final = "mlflow.trace.tokenUsage"


class Traces:
    """See the module's docstring.

    Args:
        content: how prompts and answers are shown.
        sampler: which traces are kept.
        bridged: whether MLflow hands its own traces over, so that attempts in them wait for it.

    Attributes:
        sampled_out: traces that were left out so far.
        last_batch: number of the newest batch.
        links: of the traces in batches to the runs of variants.
    """

    def __init__(self, content: Content, sampler: Sampler, bridged: bool = False) -> None:
        self.content = content
        self.bridged = bridged
        self._sampler = sampler
        self.last_batch = 0
        self._numbers = itertools.count(1)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.sampled_out = 0
        self._sampler = Sampler(self._sampler.share)
        self._predictors = Predictors()
        self._open: OrderedDict[str, Trace] = OrderedDict()
        self._shipped: OrderedDict[str, Trace | None] = OrderedDict()  # None: left out
        self._ended: list[Trace] = []
        self._since = 0.0
        self.links = Links()

    @property
    def pending(self) -> bool:
        """Whether something will have to be shipped without anything new coming."""
        return bool(self._ended or self._open)

    def ready(self, now: float, at_once: bool = False, unfinished: bool = False) -> list[Batch]:
        """The batches to be written now.

        Args:
            at_once: do not wait for company. unfinished: also what has not ended.
        """
        while self._open:
            trace_id, trace = next(iter(self._open.items()))
            if not unfinished and now - trace.begun < PATIENCE:
                break
            self._close(trace_id, trace)
        if not self._ended or not (at_once or len(self._ended) >= BATCH or now - self._since >= LINGER):
            return []
        ended, self._ended = self._ended, []
        for trace in ended:
            if trace.places and trace.id is not None:
                self.links.add(trace.id, trace.places)
        return [batch_of(self.number(), ended[start : start + BATCH]) for start in range(0, len(ended), BATCH)]

    def left_out(self, trace_id: str) -> bool:
        """Whether sampling is known to have left a trace out, by `tr-...`."""
        digits = trace_id.removeprefix("tr-")
        return digits in self._shipped and self._shipped[digits] is None

    def number(self) -> int:
        """The number of a new batch."""
        self.last_batch = next(self._numbers)
        return self.last_batch

    # -- what is posted ----------------------------------------------------------------------------------------------
    def attempted(self, node: LeanNode, record: CallRecord, route: Way, response: Any, breaker: str | None) -> None:
        """An attempt, to be put into its trace."""
        started = int(record.started_at * 1e9)
        attributes = attempt_attributes(record, breaker, input_nano(record, route.rates(), response))
        if node.kind == "EMBEDDING":
            attributes[TYPE] = node.kind
        made = span(
            node.trace_id, record_span_id(record.id), node.span_id, attempt_name(record), started,
            started + int(record.latency * 1e9), self.content.attributes(attributes), attempt_error(record),
            record.error,
        )  # fmt: skip
        trace = self._trace(node.trace_id)
        if trace is None:
            return
        trace.spans.append(made)
        trace.cost += record.cost_nano or 0
        trace.unknown |= record.cost_nano is None
        trace.usage[0] += record.input_tokens or 0
        trace.usage[1] += record.output_tokens or 0
        trace.remarkable |= record.outcome not in ("ok", "cached", "replayed") or record.route != "primary"
        trace.whose.update(whose(record))
        trace.answer = trace.answer.after(record)
        trace.sample = node.context.sample
        self._belongs(trace, node)
        if node.trace_id in self._shipped:  # it had ended before
            self._total(trace)
            self._queue(trace)

    def ended(self, node: LeanNode) -> None:
        """A node has ended."""
        if node.live:
            self._live_ended(node)
            return
        trace = self._trace(node.trace_id)
        if trace is None:
            return
        failure, kind = node.error, type(node.error).__name__
        error, told = self._error(failure), node.attributes
        predictor = self._predictors.name(node.program, node.callers) if node.kind == "CHAT_MODEL" else None
        attributes: dict[str, Any] = {TYPE: node.kind, MESSAGES: "dspy" if node.kind == "CHAT_MODEL" else None}
        attributes.update({f"dspy_prod.{name}": value for name, value in told.items() if name != "error"})
        if predictor is not None:
            attributes.update({"dspy_prod.predictor": predictor, "dspy_prod.model": node.name})
        if told.get("error"):
            attributes["dspy_prod.error"] = self.content.error(str(told["error"]).partition(":")[0], str(told["error"]))
        inputs = self._rendered(lambda: _filled(self.content.shown(node.inputs)))
        outputs = self._rendered(lambda: self.content.shown(node.outputs))
        if told.get("status") == "fallback":
            outputs = _filled(outputs)
        self._belongs(trace, node)
        if node.parent_id is None:
            trace.sample = node.context.sample
            trace.place, run = node.place
            trace.run = None if run is None else (f"tr-{node.trace_id}", run)
            its = {**known(node), **trace.whose, **whose(node.context)}
            if len(trace.places) > 1:  # experiments within the one around it all
                others = outer_tags((*trace.places, Assignment("")))
                its = {**{f"dspy_prod.tag.{name}": value for name, value in others.items()}, **its}
            self._note(trace, told, failure, error, outputs)
            attributes.update(trace_attributes(its, predictor or node.name))
            attributes.update({f"{TAG}{name}": value for name, value in trace.ending.items()})
        elif not trace.whose:  # refused before an attempt
            trace.whose = {**known(node), **whose(node.context)}
        attributes = self.content.attributes(attributes)
        node.inputs = node.outputs = node.error = None  # an error's traceback would keep the prompt for long
        node.callers = node.program = node.subject = None
        if node.parent_id is None and node.kind == "CHAT_MODEL":
            inputs, outputs = chat(inputs, outputs)
        attributes[INPUTS], attributes[OUTPUTS] = inputs, outputs
        made = span(
            node.trace_id, node.span_id, node.parent_id, self.content.name(predictor or node.name), node.started_ns,
            node.ended_ns, attributes, error, None if failure is None else kind,
        )  # fmt: skip
        trace.spans.append(made)
        trace.remarkable |= error is not None or told.get("status") == "fallback"
        if node.trace_id in self._shipped:
            self._queue(trace)
        elif node.parent_id is None:
            self._close(node.trace_id, trace)

    def _live_ended(self, node: LeanNode) -> None:
        """A call has ended within a trace that MLflow records, whose headline is to say how."""
        if not self.bridged:
            self.delegated(node.trace_id)
            return
        plain = node.error is None and node.attributes.get("status") in (None, "ok", "cached")
        trace = self._open.get(node.trace_id) if plain else self._trace(node.trace_id)
        if trace is None:
            return
        self._belongs(trace, node)
        if not trace.whose:
            trace.whose = {**known(node), **whose(node.context)}
        if node.kind != "CHAT_MODEL" or node.error is not None:  # of a model that failed, the program may have got over
            outputs = None if plain else self._rendered(lambda: self.content.shown(node.outputs))
            self._note(trace, node.attributes, node.error, self._error(node.error), _filled(outputs))
        node.inputs = node.outputs = node.error = node.callers = node.program = node.subject = None

    def _belongs(self, trace: Trace, node: LeanNode) -> None:
        """Note in which experiments a call was."""
        for place in node.context.assignments:
            trace.id = f"tr-{node.trace_id}"
            trace.places.setdefault(place, False)

    def _note(self, trace: Trace, told: Mapping[str, Any], failure: Any, error: str | None, outputs: Any) -> None:
        """Note how a trace ended, as its tags and MLflow's list tell it."""
        status, reason = status_of(told, failure, trace.answer), reason_of(told, failure)
        trace.ending = {"dspy_prod.status": status, **({"dspy_prod.reason": reason} if reason else {})}
        if trace.answer.fallback is not None and failure is None and status != "fallback":
            trace.ending["dspy_prod.route"] = trace.answer.fallback
        trace.line = line_of(status, reason, error, outputs, trace.answer)

    def _error(self, failure: BaseException | None) -> str | None:
        """An error as it may be shown."""
        if failure is None:
            return None
        kind = type(failure).__name__
        return self._rendered(lambda: self.content.error(kind, error_text(failure)), kind)  # type: ignore[no-any-return]

    def foreign(self, handed: Any, place: str | None = None) -> None:
        """A whole trace that MLflow itself recorded; `place`: the experiment it goes to, if not the usual one."""
        info = handed.info.to_dict()
        trace_id = str(handed.info.trace_id).removeprefix("tr-")
        trace = self._trace(trace_id)
        if trace is None:
            return
        for one in handed.data.spans:
            shown = self._rendered(lambda: self.content.foreign(one.to_dict()))  # noqa: B023  (called at once)
            if isinstance(shown, dict):
                trace.spans.append(shown)
        trace.place = place
        if place is None:
            info.pop("trace_location", None)
        failed = str(info.get("state", "")).endswith("ERROR")
        if trace.ending.get("dspy_prod.status") in ("refused", "error") and not failed:
            trace.ending, trace.line = {}, None  # the program has got over it
        trace.info = self.content.foreign_info(info)
        trace.remarkable |= failed
        self._total(trace)
        self._close(trace_id, trace)

    def _rendered(self, render: Callable[[], Any], instead: str = "[could not be shown]") -> Any:
        """What is shown of a caller's objects, whose own methods may fail: the span itself must not be lost."""
        try:
            return render()
        except Exception:
            _log.debug("A part of a trace could not be shown", exc_info=True)
            return instead

    def refused(self, trace_id: str) -> None:
        """A trace that MLflow recorded was turned away: its attempts are not kept either."""
        self._open.pop(trace_id, None)

    def delegated(self, trace_id: str) -> None:
        """MLflow ships the trace by itself; the attempts follow, whatever sampling says."""
        trace = self._open.get(trace_id)
        if trace is not None:
            trace.counted, trace.remarkable = False, True
            self._close(trace_id, trace)

    # -- closing -----------------------------------------------------------------------------------------------------
    def _trace(self, trace_id: str) -> Trace | None:
        """The trace, in the making or shipped before; None when it was left out."""
        trace = self._open.get(trace_id)
        if trace is None:
            if trace_id in self._shipped:
                return self._shipped[trace_id]
            trace = self._open[trace_id] = Trace(time.monotonic())
        return trace

    def _close(self, trace_id: str, trace: Trace) -> None:
        self._open.pop(trace_id, None)
        kept = self._sampler.keeps(trace_id, trace.remarkable, trace.cost, trace.sample)
        self._shipped[trace_id] = trace if kept else None
        if len(self._shipped) > _REMEMBERED:
            self._shipped.popitem(last=False)
        if kept:
            self._queue(trace)
        elif trace.counted:
            self.sampled_out += 1

    def _queue(self, trace: Trace) -> None:
        if not self._ended:
            self._since = time.monotonic()
        if trace not in self._ended:
            self._ended.append(trace)

    def _total(self, trace: Trace) -> None:
        """Write the sums of the attempts into a headline of MLflow's, where there is one."""
        info = trace.info
        if info is None:
            return
        metadata = info.setdefault("trace_metadata", {})
        if not (trace.unknown and not trace.cost):
            metadata[_COST] = dumped({"total_cost": trace.cost / 1e9})
        if any(trace.usage) and _USAGE not in metadata:
            metadata[_USAGE] = dumped(tokens(*trace.usage))
        info.setdefault("tags", {}).update({**tags_of(trace.whose), **trace.ending})
        if trace.line is not None:
            info["response_preview"], trace.line = trace.line, None
        metadata.update({HEADLINES[key]: str(value) for key, value in trace.whose.items() if key in HEADLINES})


def _filled(shown: Any) -> Any:
    """Without the fields that have no value: a fallback's text fills one of several."""
    return {name: value for name, value in shown.items() if value is not None} if isinstance(shown, dict) else shown
