"""An attempt's error as the caller sees it: DSPy's class, and no key in its text.

Providers like to echo the key they refuse. The whole chain of causes is mended, because a traceback prints all of it.
"""

from __future__ import annotations

import time
from contextlib import suppress
from math import inf
from typing import Any

from dspy.clients.errors import wrap_error
from dspy.lm15 import LM15Error, ProviderError, TransportError, UnsupportedFeatureError
from dspy.utils.exceptions import LMError, LMProviderError
from pydantic import ValidationError

from dspy_prod.compat.bounds import BodyTooLongError
from dspy_prod.compat.lm15 import error_of_status, raised_by_reader
from dspy_prod.compat.stay import mark_of, set_mark
from dspy_prod.pipeline.upstream.ends import EARLY, AttemptTimeoutError, SealedError, bounded_by, causes_of
from dspy_prod.pipeline.upstream.headers import hint_in, refusal_of, should_retry_in
from dspy_prod.pipeline.upstream.heard import heard
from dspy_prod.pipeline.upstream.upstream import Upstream
from dspy_prod.privacy.known import blotted_in, known
from dspy_prod.privacy.names import secrets_in


def public_error(error: Exception, upstream: Upstream, until: float, outside: BaseException | None = None) -> Exception:
    """The error as DSPy shows it; our own time limit stays recognisable.

    Args:
        error: what the attempt raised.
        upstream: what was asked.
        until: when the attempt was to end (monotonic).
        outside: what its caller was handling: see `bounded_by`.
    """
    if hasattr(error, "own_causes"):  # an engine may raise one error again and again
        with suppress(AttributeError):
            error.own_causes = None
    own = bounded_by(outside, error)
    if own is None:
        return _shown(error, upstream, until)
    with suppress(AttributeError, ValueError):  # pydantic's take none
        error.own_causes = own  # type: ignore[attr-defined]
    shown = _shown(error, upstream, until)
    if shown is not error:
        shown.own_causes = own + 1  # type: ignore[attr-defined]
    return shown


def _shown(error: Exception, upstream: Upstream, until: float) -> Exception:
    raised, mark = error, mark_of(error)
    headers, status = refusal_of(error)
    if mark.rejected or mark.unasked:
        return _without_secrets_of(upstream, _said_by_user(error, upstream), raised)
    if isinstance(error, AttemptTimeoutError):
        return error
    if until != inf and isinstance(error, TransportError) and time.monotonic() >= until - EARLY:
        return AttemptTimeoutError()
    if isinstance(error, UnsupportedFeatureError) and raised_by_reader(error):
        # No request that could not be sent: it was, and is owed.
        error = ProviderError(error.message).with_traceback(error.__traceback__)
    if status is not None and (isinstance(error, TransportError) or not isinstance(error, LM15Error)):
        # It was refused, whatever became of the body that says why.
        why = f"HTTP {status}, and nothing to be read that says why"
        error = error_of_status(status, why, provider=upstream.provider)
    if mark_of(error).came == "begun" and heard(error).shape == "garbled":
        # LiteLLM says for it what it says of a connection that broke, of a server that fails, or of a bad request.
        error = ProviderError(f"The provider's stream cannot be read: {error}").with_traceback(error.__traceback__)
    for cause in causes_of(error):
        if isinstance(cause, BodyTooLongError):  # LiteLLM calls it an error of the connection
            error = ProviderError(str(cause), status=cause.response.status_code).with_traceback(error.__traceback__)
    wrapped: Any = wrap_error(error, model=upstream.model, provider=upstream.provider)
    if isinstance(wrapped, LMError):
        wrapped.retry_after = hint_in(headers, wrapped.retry_after)
        wrapped.should_retry = should_retry_in(headers)
        set_mark(wrapped, mark)
        # The native engine tells a status with every HTTP error: one without came inside an answer.
        wrapped.begun = isinstance(upstream.spec, str) and isinstance(wrapped, LMProviderError)
        if headers and not getattr(wrapped, "rate_limit_headers", None):
            wrapped.rate_limit_headers = {name: (value,) for name, value in headers.items() if "ratelimit" in name}
    return _without_secrets_of(upstream, wrapped, raised)


def _said_by_user(error: Any, upstream: Upstream) -> Exception:
    """What LiteLLM's user raised in a rule or a hook, as nothing that the provider or a policy of this call has said.

    A service or a model that a guardrail asks may be down, or refused for a budget of its own. Nor does a warning that
    was made an error, as Python can be told to, go past the policies: it too says no to this model alone.
    """
    clean = error
    if isinstance(error, (LM15Error, LMError, Warning)):
        clean = ProviderError(str(getattr(error, "message", None) or error)).with_traceback(error.__traceback__)
    wrapped: Any = wrap_error(clean, model=upstream.model, provider=upstream.provider)
    set_mark(wrapped, mark_of(error))
    return wrapped  # type: ignore[no-any-return]


def _without_secrets_of(upstream: Upstream, error: Exception, cause: Exception) -> Exception:
    """The same error, with known secrets blotted out of its texts and those of its causes.

    Args:
        upstream: whose keys they are.
        error: what the caller will see.
        cause: what it will be raised from.
    """
    secrets = known() | secrets_in(upstream.clients) | secrets_in(upstream.extras)
    seen: set[int] = set()
    _mend(cause, secrets, seen)
    _mend(error, secrets, seen)
    return error


def _mend(error: BaseException, secrets: set[str], seen: set[int]) -> None:
    """Mend an error, after all that it was raised from and all that it holds: its own texts may be made of theirs."""
    if id(error) in seen:
        return
    seen.add(id(error))
    held = {name: value for name, value in vars(error).items() if isinstance(value, BaseException)}
    cause, context, suppressed = error.__cause__, error.__context__, error.__suppress_context__
    for each in (cause, context, *held.values()):
        if each is not None:
            _mend(each, secrets, seen)
    error.__cause__, error.__context__ = _open(cause, secrets), _open(context, secrets)
    error.__suppress_context__ = suppressed
    for name, value in held.items():
        if (opened := _open(value, secrets)) is not value:
            with suppress(AttributeError):
                setattr(error, name, opened)
    _blot(error, secrets)


def _open(error: BaseException | None, secrets: set[str]) -> BaseException | None:
    """The error itself; where nobody can change what it says, such as pydantic's, another one that says it."""
    if not isinstance(error, ValidationError):
        return error
    said = str(error)
    clean = blotted_in(said, secrets)
    if clean == said:
        return error
    opened = SealedError(f"{type(error).__name__}: {clean}").with_traceback(error.__traceback__)
    opened.__cause__, opened.__context__ = error.__cause__, error.__context__
    opened.__suppress_context__ = error.__suppress_context__
    return opened


def _blot(error: BaseException, secrets: set[str]) -> None:
    """Texts, notes and tables; what else hangs on an error (a response, a request) does not show in its traceback."""
    args = blotted_in(error.args, secrets)
    if args is not error.args:
        error.args = args
    for name, value in list(vars(error).items()):
        clean = blotted_in(value, secrets)
        if name == "message" and not isinstance(clean, str):  # what a provider said, whatever it is: others read text
            clean = "" if clean is None else str(clean)
        if clean is not value:
            with suppress(AttributeError):  # it cannot be set, and does not show either
                setattr(error, name, clean)
