"""`Production`: a DSPy program that keeps answering when its model does not, and says what each call did."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import dspy
from dspy.utils.callback import BaseCallback

from dspy_prod.compat.dspy import CompiledAsProgram
from dspy_prod.context.current import current, mark_of
from dspy_prod.context.scoring import is_raising, raising
from dspy_prod.errors import ConfigError
from dspy_prod.privacy.error_text import error_text
from dspy_prod.production.conditions import Conditions
from dspy_prod.production.fallback import Answer, Fallback, Outputs
from dspy_prod.production.reasons import reason_of
from dspy_prod.production.report import CallReport, TokenUsage, call_report, report_of
from dspy_prod.production.states import vouchless
from dspy_prod.production.unguarded import Guard, Unguarded
from dspy_prod.production.watch import Watch
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock
from dspy_prod.telemetry.events import BUS
from dspy_prod.telemetry.tap import NOTHING, TAP, Node

if TYPE_CHECKING:
    from dspy_prod.registry.published.follow import Follower

_log = logging.getLogger("dspy_prod")


class Production(CompiledAsProgram, dspy.Module):
    """A program with a last fallback, a name in the ledger, and a report of every call.

    It is a `dspy.Module` around another one: call it, `await prod.acall(...)`, `dspy.streamify(prod)`, run it in
    `dspy.Parallel` or `batch`. Predictors, state and LMs are those of the program: `save` writes a file that the bare
    program loads and the other way round, and optimizers compile it as they compile the program.

    What the fallback answers for (`call_report(pred).reason`):

    - `circuit_open`, `rate_limited`, `budget_exceeded`, `deadline_exceeded`, `unpriced_model`, `store_unavailable`,
      `run_stopped`, `stopped`, `outage`: refused by this library (`RejectedError`).
    - `upstream_error`: any other `LMError`, once retries and model fallbacks are exhausted. A revoked key, a missing
      setting or an overlong prompt count too: the user in front of the program can mend none of them. Watch the
      `fallback_response` event (`dspy_prod.enable_logging()`) to notice.
    - `parse_error`: the model answered, but not in the signature's form (`AdapterParseError`).
    - `unexpected_error`: any other `Exception`, with `catch="all"` only; it is logged with its traceback, for it is
      probably a defect. Otherwise a mistake in the program or its inputs raises, as without `Production`.

    `KeyboardInterrupt`, cancellation and other `BaseException`s always pass. Errors also pass, instead of being
    answered, when there is no fallback for the reason; inside `dspy.Evaluate`, an optimizer's `compile` and
    `dspy_prod.context.scoring.raising()`, where a canned answer must not be scored; and once a part of a streamed
    answer was sent, since a second answer would contradict it.

    How each call ended, with an answer, a refusal or an error, is recorded in the store of the program's LM:
    `lm.ledger.program_calls(...)`, and the sums `lm.ledger.programs(by=...)`. What `dspy.Evaluate` and `compile` run is
    not, and neither is a program that has no `dspy_prod.LM`.

    Args:
        program: the `dspy.Module` to run.
        name: recorded as the program of each call; default: the program's class name.
        fallback_response: what to answer instead of raising; None: nothing, the error is raised. One of

            - a string: fills the program's only, else its last, text output; the other outputs are None;
            - a dict of outputs; those it does not name are None. A `dspy.Prediction` is taken as it is;
            - a function of the inputs that returns one of these, or None to let the error pass. It may be async, for
              `acall`;
            - a `dspy.Module`, run with the same inputs, under the caller's deadline but not under `deadline`. When it
              fails too, its error is raised from the first one;
            - a table of these by reason, with the program's name and `"default"` for the rest. A table that has a
              `"default"` may name other programs too, so several can share it.
        catch: `"unavailable"`, or `"all"` for every `Exception`.
        deadline: seconds for one call of the program; an earlier one of the caller holds.
        priority, tags: as in `call_context`; a priority given here wins over the caller's, tags are merged.
        follow: a program version in MLflow to run, such as `"triage@production"`. A promotion is picked up within
            `refresh` seconds, between two calls; a call runs on one version from begin to end. See
            `dspy_prod.registry.published.follow`.
        refresh: seconds between two looks at MLflow, in the background; no call waits for it.
        unguarded: what to do about an LM that is not a `dspy_prod.LM`, whose calls pass budget, limits and ledger, when
            it is on a predictor or another module, in the adapter or among the call's arguments: `"warn"` once, naming
            the place; `"refuse"` with a `ConfigError`, here and at each call; or `"allow"`. Each call is looked at as
            it begins: what `forward` sets itself, as by `dspy.context(lm=...)`, is not seen.
        callbacks: DSPy callbacks of this module.
        clock: for tests.

    Attributes:
        program: the wrapped program; with `follow`, a copy of it with the published state.

    Raises:
        ConfigError: an impossible argument; the message names it and the remedy.

    Example:
        ```python
        service = dspy_prod.Production(program, name="triage", fallback_response="We will get back to you.")
        print(service(message="The app crashes.").reply)
        ```
    """

    def __init__(
        self,
        program: dspy.Module,
        name: str | None = None,
        fallback_response: Any = None,
        catch: Literal["unavailable", "all"] = "unavailable",
        *,
        deadline: float | dt.timedelta | None = None,
        priority: Literal["high", "normal", "low"] | None = None,
        tags: Mapping[str, str] | None = None,
        follow: str | None = None,
        refresh: float | dt.timedelta = 60.0,
        unguarded: Unguarded = "warn",
        callbacks: list[BaseCallback] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__(callbacks=callbacks)
        if not isinstance(program, dspy.Module):
            raise ConfigError(f"Production takes a dspy.Module, got {type(program).__name__}")
        if catch not in ("unavailable", "all"):
            raise ConfigError(f"catch={catch!r}: use 'unavailable' or 'all'")
        self.program = program
        self.name = type(program).__name__ if name is None else name
        self.catch = catch
        self._conditions = Conditions(self.name, deadline, priority, tags, clock)
        self._fallback = None
        if fallback_response is not None:
            self._fallback = Fallback(fallback_response, self.name, Outputs.of(program))
        self._guard = Guard(self.name, unguarded, self._fallback)
        self._guard.look(program)
        self._follower: Follower | None = None
        if follow is not None:
            from dspy_prod.registry.published.follow import Follower

            self._follower = Follower(self, follow, refresh)

    @property
    def is_following(self) -> bool:
        """Whether its program is replaced when an alias moves."""
        return self._follower is not None

    def close(self) -> None:
        """Stop following; the program stays what it is."""
        if self._follower is not None:
            self._follower.close()

    # -- calling -----------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program, else answer with the fallback; called through `prod(...)`."""
        program = self._snapshot(args, kwargs)
        tap = TAP.active
        with NOTHING if tap is None else tap.program_call(self.name, _inputs(args, kwargs)) as node:
            with self._watch(program, args, kwargs) as watch:
                try:
                    with watch.program():
                        result = program(*args, **kwargs)
                except Exception as error:
                    answer = self._answer_to(error, watch)
                    if answer is None:
                        raise
                    with watch.fallback(error):
                        value = answer.give(args, kwargs)
                    result = self._answered(value, error, watch)
                else:
                    watch.finish(result)
            return _noted(node, result)

    async def aforward(self, *args: Any, **kwargs: Any) -> Any:
        """Asynchronous `forward`; called through `await prod.acall(...)`."""
        program = self._snapshot(args, kwargs)
        if not hasattr(program, "aforward"):
            raise TypeError(
                f"{type(program).__name__} has no aforward: write one, or call `await dspy.asyncify(prod)(...)`"
            )
        tap = TAP.active
        with NOTHING if tap is None else tap.program_call(self.name, _inputs(args, kwargs)) as node:
            with self._watch(program, args, kwargs) as watch:
                try:
                    with watch.program():
                        result = await program.acall(*args, **kwargs)
                except Exception as error:
                    answer = self._answer_to(error, watch)
                    if answer is None:
                        raise
                    with watch.fallback(error):
                        value = await answer.agive(args, kwargs)
                    result = self._answered(value, error, watch)
                else:
                    watch.finish(result)
            return _noted(node, result)

    def _snapshot(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The program of one call, however often it is replaced meanwhile."""
        if self._follower is not None:
            self._follower.keep_going()
        program = self.program
        self._guard.look(program, args, kwargs)
        return program

    def _watch(self, program: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Watch:
        return self._conditions.watch(mark_of(program), self._guard.programs(program, args, kwargs))

    def _answer_to(self, error: Exception, watch: Watch) -> Answer | None:
        if self._fallback is None or is_raising() or watch.visible or watch.left(error):
            return None
        reason = reason_of(error)
        if reason == "unexpected_error":
            if self.catch != "all":
                return None
            _log.error("%s failed with an unexpected error; its fallback answers", self.name, exc_info=error)
        return self._fallback.answer(reason)

    def _answered(self, value: Any, error: Exception, watch: Watch) -> Any:
        assert self._fallback is not None
        try:
            prediction = self._fallback.outputs.prediction(value)
        except TypeError as wrong:
            raise wrong from error
        if prediction is None:
            raise error
        reason, text = reason_of(error), error_text(error)
        watch.finish(prediction, error)
        if BUS.active:
            context = current()._replace(program=self.name)
            BUS.emit("fallback_response", self._conditions.clock.time(), reason=reason, error=text, **context.told())
        return prediction

    # -- the program's own -------------------------------------------------------------------------------------------
    def named_parameters(self) -> list[tuple[str, Any]]:
        """The program's, under its own names."""
        return list(self.program.named_parameters())

    def named_predictors(self) -> list[tuple[str, Any]]:
        """The program's, under its own names."""
        return list(self.program.named_predictors())

    def map_named_predictors(self, func: Callable[[Any], Any]) -> Production:
        """Replace each predictor of the program by what the function makes of it."""
        if isinstance(self.program, dspy.Predict):
            self.program = func(self.program)
        else:
            self.program.map_named_predictors(func)
        self._guard.again()
        return self

    def set_lm(self, lm: Any) -> None:
        """Set the LM of the program's predictors."""
        self.program.set_lm(lm)

    def get_lm(self) -> Any:
        """The LM that all predictors of the program use."""
        return self.program.get_lm()

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """The program's state."""
        state: dict[str, Any] = self.program.dump_state(json_mode=json_mode)
        return state

    def load_state(self, state: dict[str, Any], *, allow_unsafe_lm_state: bool = False) -> Any:
        """Load the program's state.

        Args:
            state: what `dump_state` gave, or the file that `save` wrote holds.
            allow_unsafe_lm_state: whether whoever wrote it is trusted. Else LMs are rebuilt from what cannot lead their
                calls elsewhere, and a warning names the rest.

        Raises:
            ConfigError: nobody vouches for a state by which calls could go elsewhere, or that DSPy did not write.
        """
        if not allow_unsafe_lm_state:
            state = vouchless(self.program, state)
        return self.program.load_state(state, allow_unsafe_lm_state=allow_unsafe_lm_state)

    def __repr__(self) -> str:
        return f"Production({self.name!r}, {self.program!r})"


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"args": list(args), **kwargs} if args else kwargs


def _noted(node: Node, result: Any) -> Any:
    """The result, noted in its trace."""
    if node is not NOTHING:
        report = report_of(result)
        told = {} if report is None else {"status": report.status, "reason": report.reason, "error": report.error}
        node.answered(result, **told)
    return result


__all__ = ["CallReport", "Production", "TokenUsage", "call_report", "raising", "reason_of"]
