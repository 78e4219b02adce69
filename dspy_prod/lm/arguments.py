"""How one argument of `LM` is taken, kept, written in a config file and saved; `settings.py` has the table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import dspy

from dspy_prod.errors import ConfigError
from dspy_prod.options import Budget, Options, Price, Retry

ALWAYS: Final[Any] = object()
"""The `off` of an argument that is not switched off."""


@dataclass(frozen=True)
class Argument:
    """A row of the table of arguments.

    Attributes:
        kind: what a config file holds for it, where options are a table; None: an object, which no file can hold.
        default: the setting when nobody gives it.
        off: the setting for `False`, and under `DSPY_PROD_DISABLED`.
        parse: makes the setting of what was given; default: options of `kind`, else as it was given.
        rebuilds: what `LM.copy` makes anew for it: the pipeline, the store beneath it too, or nothing.
        saved: whether a saved state holds it (where it is not the default).
        name: the argument's name; default: that of the setting.
    """

    kind: Any
    default: Any = None
    off: Any = ALWAYS
    parse: Callable[[Any], Any] | None = None
    rebuilds: Literal["pipeline", "store", "nothing"] = "pipeline"
    saved: bool = True
    name: str = ""

    def setting(self, given: Any) -> Any:
        """The setting that an argument asks for.

        Raises:
            ConfigError: it cannot be had; the message names the argument.
        """
        if self.parse is not None:
            return self.parse(given)
        kind = options_in(self.kind)
        return given if kind is None else option(kind, given, self.name, default=self.default, off=self.off)


def options_in(kind: Any) -> type[Options] | None:
    """The class of options in a `kind`: `Retry` in `Retry`, `Budget` in `list[Budget]`."""
    inner = (get_args(kind) or (kind,))[-1]
    return inner if isinstance(inner, type) and issubclass(inner, Options) else None


def check_tokens(kwargs: Mapping[str, Any]) -> None:
    """See that a bound on what is generated is a number: what a call may cost is counted by it.

    Raises:
        ConfigError: it is none; the message names the argument.
    """
    for name in ("max_tokens", "max_completion_tokens"):
        given = kwargs.get(name)
        try:
            int(given or 0)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{name}={given!r} must be a number of tokens, such as {name}=1000") from None


def option(kind: type[Options], value: Any, name: str, *, default: Options | None = None, off: Any = None) -> Any:
    """A policy option as given: an instance, a table of its fields, None for the default, False for off."""
    if value is None:
        return default
    if value is False:
        return off
    if value is True:
        return default if default is not None else kind()
    if isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        return kind(**value)
    raise ConfigError(
        f"{name}= takes a dspy_prod.{kind.__name__}, a mapping of its fields, or False to switch it off; "
        f"got {type(value).__name__}"
    )


def retry_option(retry: Any, num_retries: Any) -> Any:
    """`retry=`, or what DSPy's `num_retries=` says in its place."""
    if num_retries is None:
        return retry
    if retry is not None:
        raise ConfigError(
            "retry= and num_retries= both say how often to try; give one (num_retries=n means Retry(attempts=n+1))"
        )
    if isinstance(num_retries, bool) or not isinstance(num_retries, int) or num_retries < 0:
        raise ConfigError(f"num_retries={num_retries!r} must be a non-negative integer")
    return Retry(attempts=num_retries + 1)


def budget_options(budget: Any) -> tuple[Budget, ...]:
    """`budget=`: none, one or several."""
    if budget is None or budget is False:
        return ()
    given: Sequence[Any] = budget if isinstance(budget, (list, tuple)) else (budget,)
    budgets = tuple(option(Budget, item, "budget") for item in given)
    if any(item is None for item in budgets):
        raise ConfigError("budget= takes dspy_prod.Budget objects; drop the empty entry")
    titles = [item.title for item in budgets]
    for title in titles:
        if titles.count(title) > 1:
            raise ConfigError(f"two budgets are called {title!r}; give one of them its own name=...")
    return budgets


def price_options(prices: Any) -> dict[str, Price]:
    """`prices=`: model string to `Price`."""
    if prices is None:
        return {}
    if not isinstance(prices, Mapping):
        raise ConfigError(
            'prices= takes a mapping such as {"openai/my-model": dspy_prod.Price(input=0.15, output=0.6)}'
        )
    return {str(name): option(Price, price, f"prices[{name!r}]") for name, price in prices.items()}


def fallback_list(fallbacks: Any) -> tuple[str | dspy.LM, ...]:
    """`fallbacks=`: model names and LMs, in order."""
    if isinstance(fallbacks, (str, dspy.LM)):
        raise ConfigError("fallbacks= takes a list, e.g. fallbacks=['anthropic/claude-haiku-4-5']")
    return tuple(fallbacks)
