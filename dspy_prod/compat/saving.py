"""Who writes a parameter's state, and who reads it: DSPy's own loaders set each key of it as an attribute."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import CodeType
from typing import Any

import dspy
from dspy.predict.parameter import Parameter


def is_parameter(program: Any) -> bool:
    """Whether a program is one itself, as `dspy.Predict` and `dspy.Flex`: its state is that of the program."""
    return isinstance(program, Parameter)


def is_read_by_dspy(parameter: Any) -> bool:
    """Whether a loader of DSPy's reads the parameter's state, or may be asked to by that of its own class."""
    return any(
        each.__module__.startswith("dspy.") and "load_state" in vars(each)
        for each in type(parameter).__mro__
        if each is not dspy.Module  # which reads that of its parameters
    )


def writes_more(parameter: Any) -> bool:
    """Whether the class of a predictor has a `dump_state` of its own."""
    return getattr(type(parameter), "dump_state", None) is not dspy.Predict.dump_state


def keys_beside(parameter: Any, saved: Iterable[str] = (), *, trusted: bool = False) -> set[str]:
    """Keys that the class of a predictor, or of another parameter, writes into its state beside `dspy.Predict`'s.

    What it writes always is seen in the state of a bare one. What it writes now and then is named in the code of its
    `dump_state`; or it is what the data say, where a `load_state` of its own reads it. No such key is the name of what
    every predictor has, as `forward` or `callbacks`.

    Args:
        parameter: as the program has it.
        saved: the keys of a state, of which some may be such.
        trusted: whether whoever wrote the state is: then a class that writes more may have written any of them.
    """
    if not writes_more(parameter):
        return set()
    bare = copy.copy(parameter)
    if isinstance(bare, dspy.Predict):
        bare.demos, bare.traces, bare.train, bare.lm = [], [], [], None  # which may be many, and no JSON
    always = set(bare.dump_state())
    if not isinstance(parameter, dspy.Predict):
        return always
    new = {key for key in saved if key not in always and key not in _attributes()}
    if trusted:
        return always | new
    named, known = set(_named(parameter)), set(dir(parameter))
    sometimes = {key for key in new & named if not callable(inspect.getattr_static(parameter, key, None))}
    if type(parameter).load_state is not dspy.Predict.load_state:
        sometimes |= {key for key in new if key not in known and not key.startswith("_")}
    return always | sometimes


@lru_cache(maxsize=1)
def _attributes() -> frozenset[str]:
    return frozenset(dir(dspy.Predict("question -> answer")))


def _named(predictor: Any) -> Iterator[str]:
    """Texts in the code of the `dump_state` of a predictor's own classes."""
    for each in type(predictor).__mro__[: type(predictor).__mro__.index(dspy.Predict)]:
        code = getattr(inspect.unwrap(vars(each).get("dump_state", None)), "__code__", None)
        if code is not None:
            yield from _texts(code)


def _texts(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _texts(constant)
        else:  # the keys of a literal stand together
            together = constant if isinstance(constant, (tuple, frozenset)) else (constant,)
            yield from (text for text in together if isinstance(text, str))
