"""Which candidate a program is now: two objects in one state are the same one, and one object may become another."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Set as AbstractSet
from copy import deepcopy
from typing import Any

import dspy

from dspy_prod.optimize.seen import Seen
from dspy_prod.optimize.states import State, has_sources, read


class Known:
    """What is known of one program object: its predictors, and the state that they were in when it was last read."""

    __slots__ = ("alone", "identity", "predictors", "seen")

    def __init__(self, predictors: tuple[Any, ...], alone: bool = False) -> None:
        self.predictors = predictors
        self.identity: list[tuple[Any, ...]] | None = None
        self.seen: Seen | None = None
        self.alone = alone


class Candidates:
    """All candidates of a run, and the program objects that are known to be in their states.

    Args:
        student: the program that is optimized; candidates have its class, predictors and fields.
        task_models: models of the program's LMs; what another one answers is a teacher's.

    Attributes:
        all: in order of appearance. by_key: by the key of their state.
        kinds: classes of programs that may be candidates.
    """

    def __init__(self, student: Any, task_models: AbstractSet[str]) -> None:
        self._kind = type(student)
        self._shape = _shape(student)
        self._written = has_sources(student)
        self._task_models = task_models
        self._known: dict[int, tuple[weakref.ref[Any], Known | None]] = {}  # their classes may compare by content
        self._lock = threading.Lock()
        self.kinds: set[type[Any]] = {self._kind}
        self.by_key: dict[str, Seen] = {}
        self.all: list[Seen] = []

    def seen_of(self, program: Any, *, alone: bool = False) -> Seen:
        """What was seen of the state that a program is in now."""
        known = Known(tuple([each for _, each in program.named_predictors()]), alone)
        self._remember(program, known)
        self.kinds.add(type(program))
        return self.read(program, known)

    def fits(self, program: Any) -> bool:
        """Whether a program is one of the given program's kind, so that its state tells all of it."""
        return type(program) is self._kind and _shape(program) == self._shape

    def known_of(self, program: Any) -> Known | None:
        """What is known of a program object; None when it is no candidate."""
        found = self._known.get(id(program))
        if found is not None and found[0]() is program:
            return found[1]
        known = None
        if self.fits(program):
            known = Known(tuple([each for _, each in program.named_predictors()]))
        self._remember(program, known)
        return known

    def _remember(self, program: Any, known: Known | None) -> None:
        place, everything = id(program), self._known

        def forget(gone: Any) -> None:
            found = everything.get(place)
            if found is not None and found[0] is gone:
                del everything[place]

        everything[place] = weakref.ref(program, forget), known

    def read(self, program: Any, known: Known) -> Seen:
        """The candidate that a program is now."""
        identity = [
            (predictor.signature, predictor.signature.__doc__, predictor.config, getattr(predictor, "fields", None),
             *predictor.demos)
            for predictor in known.predictors
        ]  # fmt: skip
        if known.seen is not None and known.identity == identity:  # mostly the very same objects, so this is quick
            return known.seen
        state = read(program, known.alone, self._written)
        known.identity = [
            (signature, text, dict(config), deepcopy(fields), *demos)
            for signature, text, config, fields, *demos in identity
        ]
        known.seen = self._enter(state)
        return known.seen

    def _enter(self, state: State) -> Seen:
        with self._lock:
            seen = self.by_key.get(state.key)
            if seen is None:
                seen = self.by_key[state.key] = Seen(len(self.all), state)
                self.all.append(seen)
            return seen

    def is_sample(self, known: Known) -> bool:
        """Whether an LM with a roll of its own, or a teacher's, answers: its score is not the candidate's."""
        default: Any = None
        for predictor in known.predictors:
            lm = predictor.lm
            if lm is None:
                if default is None:
                    default = dspy.settings.lm
                lm = default
            if lm is None or lm.kwargs.get("rollout_id") is not None or lm.model not in self._task_models:
                return True
        return False


def _shape(program: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Names of a program's predictors and of their fields: a proposer is a `dspy.Predict` too."""
    return [(name, tuple(predictor.signature.fields)) for name, predictor in program.named_predictors()]
