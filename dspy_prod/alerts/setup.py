"""`dspy_prod.alerts.webhook`: what is told, where and how; `sending` does it."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any
from urllib.parse import urlsplit

from dspy_prod.alerts.formats import Format
from dspy_prod.alerts.notices import DEFAULT, EXHAUSTED, KINDS, NEVER
from dspy_prod.alerts.sending import Webhook
from dspy_prod.errors import ConfigError


def webhook(
    url: str,
    events: Iterable[str] | None = None,
    every: float = 300.0,
    format: Format = "slack",
    timeout: float = 2.0,
) -> Webhook:
    """Have a chat or a pager told when something needs a person.

        dspy_prod.alerts.webhook(os.environ["SLACK_WEBHOOK"])

    Told are budgets that pass their soft threshold or are spent, circuits that open and close, what operators stop and
    let go on, promotions, rollbacks and INVALID experiments, a store that cannot be written and one that can again, and
    what MLflow lacks. The first time at once; while the same happens again and again, once in `every` seconds with a
    count.

    Of the workers that share a store and post to the same URL, the one that hears of something first tells it, and the
    others do not, as long as the store can be asked.

    No call waits for it or fails by it: messages are posted by a thread of their own, tried again with growing pauses,
    and given up after five tries, which is counted (`Webhook.status`) and logged. They hold no prompt, no answer, no
    key and nobody's name; of a budget by tenant they tell the budget. The end of the program waits at most twice
    `timeout` for what is left.

    Args:
        url: where to post; a secret, which is shown and logged nowhere.
        events: names of `dspy_prod.telemetry.events.EVENTS`, or `"budget_exhausted"`; default: those above.
        every: seconds in which the same kind of event about the same subject is told once.
        format: `"slack"` (`{"text": ...}`, which Mattermost and others take too), `"json"` (an object with `event`,
            `subject`, `level`, `text`, `at` and `folded`), or a function of a `Notice` that returns what to send as
            JSON. It runs on the thread that posts.
        timeout: seconds for one try.

    Returns:
        What sends them; its `close()` ends it.

    Raises:
        ConfigError: an argument that cannot be.

    Example:
        ```python
        hook = alerts.webhook("https://hooks.example.com/services/T0/B0/XX", events=["breaker_opened"])
        hook.close()
        ```
    """
    return Webhook(*checked(url, events, every, format, timeout))


def checked(
    url: str,
    events: Iterable[str] | None = None,
    every: float = 300.0,
    format: Format = "slack",
    timeout: float = 2.0,
) -> tuple[str, frozenset[str], float, Format, float]:
    """The arguments of a `Webhook`, or the `ConfigError` of `webhook`."""
    problem = _problem_of(url)
    if problem:
        raise ConfigError(f"webhook(url=...): {problem}")
    if isinstance(events, str):
        raise ConfigError(f"webhook(events={events!r}): use a list of names, such as [{events!r}]")
    kinds = frozenset(DEFAULT if events is None else events)
    unknown = sorted(map(str, kinds - KINDS))
    if unknown:
        hint = f"; of every call's refusals there is {EXHAUSTED!r}" if set(unknown) & NEVER else ""
        raise ConfigError(f"webhook(events=...): {unknown[0]!r} cannot be told; use some of {sorted(KINDS)}{hint}")
    for name, value in (("every", every), ("timeout", timeout)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < inf:
            raise ConfigError(f"webhook({name}={value!r}): use a positive number of seconds")
    if format not in ("slack", "json") and not callable(format):
        raise ConfigError(f"webhook(format={format!r}): use 'slack', 'json' or a function of a Notice")
    return url, kinds, float(every), format, float(timeout)


def _problem_of(url: Any) -> str:
    """Why nothing can ever be posted to a URL, which is not shown; empty where it may be."""
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        return "use a URL that begins with https:// (or http://) and names a host"
    if not (url.isascii() and url.isprintable()) or " " in url:
        return "it holds a space, a line break or another character that no URL has; write such characters as %20"
    try:
        parts = urlsplit(url)
        port, host = parts.port, (parts.hostname or "").encode("idna")
    except ValueError:
        return "its host or port cannot be read; a port is a number from 1 to 65535"
    if not host:
        return "use a URL that begins with https:// (or http://) and names a host"
    if port == 0:
        return "its host or port cannot be read; a port is a number from 1 to 65535"
    if "@" in parts.netloc:
        return "a name and password before the host are not sent; use the webhook's own URL, with its token in the path"
    return ""
