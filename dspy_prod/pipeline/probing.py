"""Waiting for the store's word that a call may be the probe of a circuit which all workers share."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import Any

from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.effects import Wait
from dspy_prod.policies.breaker.permit import Permit
from dspy_prod.policies.shared_breaker import PATIENCE, SharedBreaker
from dspy_prod.runtime.reaper import REAPER


def probing(call: Call, breaker: SharedBreaker, permit: Permit) -> Generator[Wait, Any, None]:
    """Wait until the probe that was asked for is granted; the store decides in milliseconds.

    Raises:
        CircuitOpenError: other workers have all the probes.
    """
    asked, monotonic = permit.asked, call.pipeline.clock.monotonic
    assert asked is not None
    began = monotonic()
    until = min(call.deadline, began + PATIENCE)
    try:
        while not asked.answer.done() and monotonic() < until:
            yield Wait(asked, until)
    except BaseException as error:
        if isinstance(error, GeneratorExit):  # perhaps inside the garbage collector
            REAPER.post(partial(breaker.release, permit))
        else:
            breaker.release(permit)
        raise
    finally:
        call.waited += monotonic() - began
    breaker.decided(permit)
