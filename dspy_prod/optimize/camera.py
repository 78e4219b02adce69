"""What a run sees: which program answered which example, what its answer scored, and what it cost.

A callback of DSPy sees each call of a program; the metric, which is wrapped, sees in the same thread what the answer
was worth. Together they tell the score of every state that a program was in, with every optimizer, also with those that
never evaluate anything as a whole.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final

import dspy
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import LMError

from dspy_prod.compat.racing import HEATS
from dspy_prod.context.current import current, merged_tags
from dspy_prod.optimize.gate import Answering
from dspy_prod.optimize.judging import Judge
from dspy_prod.optimize.lineage import Lineage
from dspy_prod.optimize.racing import Contest
from dspy_prod.optimize.recognizing import Candidates
from dspy_prod.optimize.seen import Seen
from dspy_prod.optimize.states import key_of, told_key
from dspy_prod.production.leaving import Here
from dspy_prod.runtime.reaper import REAPER

_SEVERAL: Final = 4
"""Examples that a state must have answered to count as a candidate where nothing is evaluated as a whole."""

ASIDE: Final = "aside"
"""The candidate that the ledger names for what is no candidate's: proposers, teachers, samples."""

FAILURE: Final = 0.0
"""The score of an example at which the program failed."""


class _Call:
    """A call of a program that is going on.

    Its inputs are read once, as it begins: other threads, which look at what is going on, might find them half changed.
    """

    __slots__ = ("answering", "counts", "here", "key", "seen")

    def __init__(self, seen: Seen, counts: bool, answering: Answering, inputs: Mapping[str, Any]) -> None:
        self.seen, self.counts, self.answering = seen, counts, answering
        self.key = told_key(inputs)
        self.here = _begun()


class Camera(BaseCallback):
    """Sees a run.

    Args:
        student: the program that is optimized; candidates have its class, predictors and fields.
        selection: the examples that the best is chosen by.
        others: further examples that scores may be seen of.
        judge: says of an error whether the program failed.
        task_models: models of the program's LMs; what another one answers is a teacher's.
        contest: the races of evaluations; None runs none.
        on_new: called with a candidate that is new or complete. on_answer: called when an LM has answered.
        lineage: where candidates come from.
        loose: what answers several examples is a candidate, also outside of evaluations.

    Attributes:
        candidates: all that were seen. latest: the best complete one. in_flight: calls of LMs that are going on,
            and where. keys: of the selection set, in order.
    """

    def __init__(
        self,
        student: Any,
        selection: Sequence[Any],
        others: Sequence[Any],
        judge: Judge,
        task_models: AbstractSet[str],
        contest: Contest | None,
        on_new: Callable[[Seen], None],
        on_answer: Callable[[], None],
        lineage: Lineage,
        loose: bool = False,
    ) -> None:
        self.candidates = Candidates(student, task_models)
        self.keys = [key_of(example) for example in selection]
        self._selected = Counter(self.keys)
        self._by_inputs = {_inputs_key(example): key_of(example) for example in [*others, *selection]}
        self._judge = judge
        self._contest = contest
        self._on_new = on_new
        self._on_answer = on_answer
        self.lineage = lineage
        self._loose = loose
        self._lock = threading.Lock()
        self._last = threading.local()
        self._calls: dict[str, _Call] = {}
        self.in_flight: dict[str, Here] = {}
        self._evaluations: dict[str, tuple[Seen, list[str], Any]] = {}
        self.latest: Seen | None = None
        self.example_keys: dict[int, str] = {id(example): key_of(example) for example in [*others, *selection]}

    # -- calls of programs ---------------------------------------------------------------------------------------------
    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Remember which state answers, and have the ledger say so."""
        if type(instance) not in self.candidates.kinds or dspy.settings.caller_modules:
            return
        known = self.candidates.known_of(instance)
        if known is None:
            return
        seen = self.candidates.read(instance, known)
        counts = not self.candidates.is_sample(known)
        context = current()
        name = str(seen.index) if counts else ASIDE
        answering = Answering(context._replace(tags=merged_tags(context.tags, {"candidate": name})))
        self._calls[call_id] = _Call(seen, counts, answering, inputs.get("kwargs") or {})
        if counts:
            seen.calls += 1

    def on_module_end(self, call_id: str, outputs: Any | None, exception: BaseException | None = None) -> None:
        """Keep the answer until its score is known, in this thread; or see why there is none."""
        call = self._calls.pop(call_id, None)
        if call is None:
            return
        call.answering.end()
        if _is_collected(call.here, exception):
            return  # nor was there an answer of this thread's
        if not call.counts or call.answering.refused:  # a program may answer all the same, but that is no answer
            self._last.answer = None
            return
        if exception is None:
            self._last.answer = (outputs, call.seen)
            return
        self._last.answer = None
        if self._judge.blames_program(exception):
            key = self._by_inputs.get(call.key)
            if key is not None:
                self.note(call.seen, key, FAILURE, failed=True)

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Know what is on its way."""
        self.in_flight[call_id] = _begun()

    def on_lm_end(self, call_id: str, outputs: Any | None, exception: BaseException | None = None) -> None:
        """See refusals, wherever they end up."""
        here = self.in_flight.pop(call_id, None)
        if here is not None and _is_collected(here, exception):
            REAPER.post(self._on_answer)
            return
        if isinstance(exception, LMError) and self._judge.refused(exception):
            Answering.spoil()  # first: DSPy only logs what a callback raises, and goes on behind it
        self._on_answer()

    # -- evaluations ---------------------------------------------------------------------------------------------------
    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """See which program is evaluated on what, and begin a race if it may end early."""
        program: Any = inputs.get("program")
        devset = inputs.get("devset") if inputs.get("devset") is not None else instance.devset
        if type(program) not in self.candidates.kinds or not devset:
            return
        known = self.candidates.known_of(program)
        if known is None:
            return
        known.predictors = tuple([each for _, each in program.named_predictors()])
        seen = self.candidates.read(program, known)
        keys = [self.key(example) for example in devset]
        seen.evaluated = True
        self.lineage.see(seen, keys, self.candidates.all[0], self.latest)
        heat = None
        if self._contest is not None and keys == self.keys and not self.candidates.is_sample(known):
            heat = self._contest.heat(seen.state.key)
            if heat is not None:
                HEATS[call_id] = heat
        self._evaluations[call_id] = (seen, keys, heat)

    def on_evaluate_end(self, call_id: str, outputs: Any | None, exception: BaseException | None = None) -> None:
        """Note what an evaluation came to."""
        HEATS.pop(call_id, None)
        begun = self._evaluations.pop(call_id, None)
        if begun is None:
            return
        seen, keys, heat = begun
        if heat is not None and heat.dropped:
            seen.predicted = heat.predicted
        if exception is None and set(keys) != set(self._selected):
            found = [seen.scores[key] for key in keys if key in seen.scores]
            if found:
                seen.minibatches.append((len(found), sum(found) / len(found)))
        self._on_new(seen)

    def blames_program(self, error: BaseException) -> bool:
        """Whether an error is the fault of what is scored, not of who could not be asked."""
        return self._judge.blames_program(error)

    def scored(self, example: Any, prediction: Any, score: float, traced: bool, failed: bool = False) -> None:
        """Take the score of the answer that this thread's last program gave, if it is of that one.

        Args:
            example: which. prediction: the answer. score: what it is worth. failed: the metric told no score.
            traced: the metric was shown a trace, so that it may have told what is a good demonstration. That is no
                score of the selection set.
        """
        answer = getattr(self._last, "answer", None)
        if answer is None:
            return
        outputs, of = answer
        key = self.key(example)
        if not key or (traced and key in self._selected):
            return
        if outputs is prediction or (isinstance(outputs, tuple) and outputs and outputs[0] is prediction):
            self.note(of, key, score, failed)

    def note(self, seen: Seen, key: str, score: float, failed: bool = False) -> None:
        """Keep the first score of a candidate on an example."""
        with self._lock:
            if key in seen.scores:
                return
            seen.scores[key] = score
            if failed:
                seen.failed.add(key)
            times = self._selected.get(key, 0)
            seen.answered += times
            seen.total += times * score
            whole = bool(times) and self.is_complete(seen)
            if self._loose and len(seen.scores) >= _SEVERAL:
                seen.evaluated = True
        if whole:
            if self._contest is not None:
                self._contest.complete(seen.state.key, [seen.scores[each] for each in self.keys])
            if self.latest is None or self.mean(seen) >= self.mean(self.latest):
                self.latest = seen
            self._on_new(seen)

    def mean(self, seen: Seen) -> float:
        """Of its scores on the selection set, as far as there are any."""
        return seen.total / seen.answered if seen.answered else float("-inf")

    def is_complete(self, seen: Seen) -> bool:
        """Whether it has a score on each example of the selection set."""
        return seen.answered == len(self.keys)

    def missing(self, seen: Seen) -> int:
        """How many examples of the selection set it has not answered."""
        return len(self.keys) - seen.answered

    def flying(self, seen: Seen) -> int:
        """How many examples of the selection set it has yet to answer and is at: each once, and no others."""
        going_on = [call for call in list(self._calls.values()) if call.seen is seen and call.counts]
        asked = {self._by_inputs.get(call.key) for call in going_on}
        return sum(key in self._selected and key not in seen.scores for key in asked)

    def key(self, example: Any) -> str:
        """The key of an example, of the run's data sets or of somebody else's; for the latter see `told_key`."""
        return self.example_keys.get(id(example)) or told_key(example)


def _begun() -> Here:
    here = Here()
    here.begin()
    return here


def _is_collected(here: Here, error: BaseException | None) -> bool:
    """Whether a call has not ended, but is closed since nobody waits for it: perhaps by the garbage collector, on a
    thread that holds a lock of the run's, so that nothing may be done there which takes one."""
    return not here.end() or isinstance(error, GeneratorExit)


def _inputs_key(example: Any) -> str:
    try:
        return key_of(example.inputs())
    except ValueError:
        return key_of(example)
