"""How failures read: an answer that nobody can use, and what every route said when none of them answered."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

from dspy.lm15 import Response
from dspy.utils.exceptions import LMError, LMTimeoutError

from dspy_prod.errors import RejectedError, UnusableAnswerError
from dspy_prod.pipeline.upstream.heard import keep_heard
from dspy_prod.runtime.twins import twin

if TYPE_CHECKING:
    from dspy_prod.pipeline.routes import Route
    from dspy_prod.policies.retry import Attempts

_FLAWS: Final = {
    "empty": "an answer with nothing in it",
    "error": "an answer that ended with an error",
    "no_end": "an answer that does not say why it ended",
    "filtered": "an answer of which its content filter left nothing",
}
_LONGEST: Final = 200


def unusable(route: Route, flaw: str, response: Response) -> UnusableAnswerError:
    """The error for an answer that nobody can use."""
    error = UnusableAnswerError(
        f"{route.model} gave {_FLAWS[flaw]}", model=route.model, provider=route.upstream.provider
    )
    error.flaw, error.partial = flaw, response
    return error


def shows_partial(error: BaseException, partial: Response) -> None:
    """Let an error show what came of a stream before it, unless the engine has said so itself."""
    if isinstance(error, LMError) and getattr(error, "partial", None) is None:
        with suppress(AttributeError):  # a class may say it by itself, and has nothing to say
            error.partial = partial


class Failures:
    """What the routes of one call said, in order. Every call makes one, and hardly one needs it.

    Attributes:
        last: the latest error.
        upstream: the latest that an upstream told.
        early: routes that were left early, with their attempts; they have their turn again.
    """

    last: Exception | None = None
    upstream: Exception | None = None
    early: tuple[tuple[Route, Attempts], ...] = ()
    _first: Exception | None = None
    _said: dict[Route, Exception] | None = None

    def add(self, route: Route, error: Exception) -> None:
        """Remember how an attempt on a route ended."""
        if self._said is None:
            self._said = {}
        if self._first is None:
            self._first = error
        self.last = error
        if not isinstance(error, RejectedError):
            self.upstream = error
            self._said[route] = error
        else:
            self._said.setdefault(route, error)

    def mark(self, error: RejectedError) -> RejectedError:
        """Have a refusal say whether an upstream was asked before, and gave no answer in time."""
        error.timed_out = isinstance(self.upstream, LMTimeoutError)
        return error

    @property
    def said(self) -> dict[Route, Exception]:
        """What each route said last; what its upstream said, if that was asked."""
        return self._said or {}

    def told(self) -> Exception:
        """The error to raise when every route has failed: the last upstream's, else the first refusal.

        If there were several routes it is another one, which names what each of them said, and is raised from what the
        first said: an engine may raise one error again and again, in other calls too, where none of this was said.
        """
        said, first = self._said, self._first
        assert said is not None
        assert first is not None
        error = self.upstream or first
        if len(said) > 1:
            first = next(iter(said.values()))
            told = twin(error)
            if told is None:  # it is told as it is
                return error
            keep_heard(told)  # what others said is no evidence of this one's
            _add(told, "; ".join(f"{route.name}: {_brief(each)}" for route, each in said.items()))
            if error is not first:
                told.__cause__ = first
            return told
        return error


def _brief(error: Exception) -> str:
    status = getattr(error, "status", None)
    name = type(error).__name__ if status is None else f"{type(error).__name__} {status}"
    text = " ".join(str(getattr(error, "message", None) or error).partition("\n\n")[0].split())
    return f"{name} ({text[:_LONGEST]})" if text else name


def _add(error: Exception, routes: str) -> None:
    note = f"\n\nNo route answered. {routes}"
    if isinstance(getattr(error, "message", None), str):
        with suppress(AttributeError):  # it is made of others, and cannot be set
            error.message += note  # type: ignore[attr-defined]
    error.args = (f"{error.args[0] if error.args else ''}{note}", *error.args[1:])
