"""LMs that a program calls past this library: no budget, no limit and no ledger knows of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import dspy
from dspy.utils import DummyLM

from dspy_prod.errors import ConfigError
from dspy_prod.pipeline.pipeline import Pipeline
from dspy_prod.stores.programs import ProgramCalls

if TYPE_CHECKING:
    from dspy_prod.production.fallback import Fallback

_log = logging.getLogger("dspy_prod")

Unguarded: TypeAlias = Literal["warn", "refuse", "allow"]
CHOICES: Final = ("warn", "refuse", "allow")
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


class Guard:
    """Looks at the LMs that a program's modules, its adapter and its arguments name, cheaply enough for each call.

    Args:
        name: the program, in words to people.
        unguarded: what to do about an LM that is not a `dspy_prod.LM`.
        fallback: may answer by modules, whose calls cost as much as the program's.
    """

    def __init__(self, name: str, unguarded: Unguarded, fallback: Fallback | None = None) -> None:
        if unguarded not in CHOICES:
            raise ConfigError(f"unguarded={unguarded!r}: use {', '.join(map(repr, CHOICES))}")
        self._name = name
        self._unguarded = unguarded
        self._fallback = fallback
        self._program: Any = None
        self._predictors: list[tuple[str, Any]] = []
        self._holders: list[tuple[str, Any, str]] = []
        self._known: set[tuple[str, str]] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return Guard, (self._name, self._unguarded, self._fallback)  # a copy looks at the copied program

    def look(self, program: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = _NOTHING) -> None:
        """Notice what has not been said yet.

        Args:
            program: what is to be called.
            args: with which arguments: `lm=` among them is used instead of a predictor's own.
            kwargs: the same.

        Raises:
            ConfigError: with `"refuse"`.
        """
        if self._unguarded == "allow":
            return
        if program is not self._program:
            self._find(program)
            self._program = program
        for who, lm in self._used(args, kwargs):
            if not is_guarded(lm):
                self._object(who, lm)

    def programs(
        self, program: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = _NOTHING
    ) -> ProgramCalls | None:
        """Where a call is recorded: in the store of the first LM of ours that the program uses, None without one."""
        if program is not self._program:
            self._find(program)
            self._program = program
        for _, lm in self._used(args, kwargs):
            pipeline = getattr(lm, "pipeline", None)
            if isinstance(pipeline, Pipeline):
                found: ProgramCalls | None = getattr(pipeline.store, "programs", None)  # a store of somebody else's
                return found
        return None

    def again(self) -> None:
        """The program's predictors were replaced."""
        self._program = None

    def _find(self, program: Any) -> None:
        self._predictors, self._holders = [], []
        others = [] if self._fallback is None else self._fallback.modules()
        for whole, of in (
            (program, repr(self._name)),
            *((other, f"the fallback of {self._name!r}") for other in others),
        ):
            for name, module in whole.named_sub_modules(dspy.Module, skip_compiled=False):
                path = name.removeprefix("self.")
                if isinstance(module, dspy.Predict):
                    self._predictors.append((f"predictor {path!r} of {of}", module))
                    continue
                for attribute, value in vars(module).items():
                    if isinstance(value, (dspy.BaseLM, dspy.Adapter)) or attribute == "sub_lm":
                        place = attribute if path == "self" else f"{path}.{attribute}"
                        self._holders.append((f"{place!r} of {of}", module, attribute))

    def _used(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        settings = dspy.settings
        default = settings.lm
        for who, predictor in self._predictors:
            lm = getattr(predictor, "lm", None)
            yield who, default if lm is None else lm
        for who, module, attribute in self._holders:
            yield from _held(who, getattr(module, attribute, None))
        adapter = settings.adapter
        if adapter is not None:
            yield from _held(f"the adapter of {self._name!r}", adapter)
        for argument in args:
            if isinstance(argument, dspy.BaseLM):
                yield f"an argument of {self._name!r}", argument
        for name, argument in kwargs.items():
            if isinstance(argument, dspy.BaseLM):
                yield f"argument {name!r} of {self._name!r}", argument

    def _object(self, who: str, lm: Any) -> None:
        model = str(getattr(lm, "model", type(lm).__name__))
        if (who, model) in self._known:
            return
        what = (
            f"{who} calls {model!r} past every budget, limit and ledger: "
            "its LM is no dspy_prod.LM; make it one, or use dspy_prod.wrap(lm)"
        )
        if self._unguarded == "refuse":
            raise ConfigError(f"{what}, or allow it with Production(..., unguarded='warn')")
        self._known.add((who, model))
        _log.warning("%s, or say Production(..., unguarded='allow')", what)


def _held(who: str, value: Any) -> Iterator[tuple[str, Any]]:
    """An LM, or those of an adapter: that of two steps reads the answer with an `extraction_model`."""
    if isinstance(value, dspy.BaseLM):
        yield who, value
    elif isinstance(value, dspy.Adapter):
        for name, held in vars(value).items():
            if isinstance(held, dspy.BaseLM):
                yield f"{name!r} of {who}", held


def is_guarded(lm: Any) -> bool:
    """Whether calls of this LM pass our pipeline, or reach nobody: no LM is set, or DSPy's dummy for tests."""
    return lm is None or isinstance(getattr(lm, "pipeline", None), Pipeline) or isinstance(lm, DummyLM)
