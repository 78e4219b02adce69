"""Differences between `dspy.LM` and `dspy_prod.LM` that are meant, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from tests.differential.mirror import Arrived


class Seen(NamedTuple):
    """What was seen of one call.

    Attributes:
        arrived: requests at the provider.
        came_back: the answer, or class and status of the error.
        history: the entry in DSPy's history, None when there is none.
    """

    arrived: list[Arrived]
    came_back: Any
    history: dict[str, Any] | None


class Meant(NamedTuple):
    """A difference that is meant.

    Attributes:
        why: the reason, for people.
        levelled: (what plain DSPy does, what ours does) of a case, both without this difference.
    """

    why: str
    levelled: Callable[[tuple[str, ...], Seen, Seen], tuple[Seen, Seen]]


def _bodies(change: Callable[[Any], Any]) -> Callable[[tuple[str, ...], Seen, Seen], tuple[Seen, Seen]]:
    def levelled(_: tuple[str, ...], theirs: Seen, ours: Seen) -> tuple[Seen, Seen]:
        return _sent(theirs, change), _sent(ours, change)

    return levelled


def _sent(seen: Seen, change: Callable[[Any], Any]) -> Seen:
    return seen._replace(arrived=[each._replace(body=change(each.body)) for each in seen.arrived])


def _without(*names: str) -> Callable[[Any], Any]:
    return lambda value: {k: v for k, v in value.items() if k not in names} if isinstance(value, dict) else value


def _told(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., tuple[Seen, Seen]]:
    def changed(seen: Seen) -> Seen:
        return seen if seen.history is None else seen._replace(history=change(seen.history))

    return lambda _, theirs, ours: (changed(theirs), changed(ours))


_REFUSED: Final = ("LMUnsupportedFeatureError", 400)


def _once(arrived: list[Arrived]) -> list[Arrived]:
    """Without a request that follows its like."""
    return [each for each, before in zip(arrived, [None, *arrived], strict=False) if each != before]


def _many(case: tuple[str, ...], theirs: Seen, ours: Seen) -> tuple[Seen, Seen]:
    if case[1] not in ("n", "made: n", "many"):
        return theirs, ours
    assert all(each.body.get("n", 1) == 1 for each in ours.arrived)
    assert len(ours.arrived) > len(theirs.arrived) or len(_once(ours.arrived)) < len(ours.arrived)
    if theirs.came_back in (_REFUSED, ("", _REFUSED)):
        return ours, ours  # not by every provider
    levelled = _told(lambda history: {**history, "usage": None, "cost": None, "outputs": None})
    theirs, ours = levelled(
        case, theirs._replace(arrived=_once(theirs.arrived)), ours._replace(arrived=_once(ours.arrived))
    )
    return _sent(theirs, _without("n")), _sent(ours, _without("n"))


def _priced(case: tuple[str, ...], theirs: Seen, ours: Seen) -> tuple[Seen, Seen]:
    if theirs.history is None or ours.history is None:
        return theirs, ours
    if theirs.history["cost"] is None or (case[1] == "hosted tool" and ours.history["cost"] is None):
        return _told(lambda history: {**history, "cost": None})(case, theirs, ours)
    return theirs, ours


def _named(case: tuple[str, ...], theirs: Seen, ours: Seen) -> tuple[Seen, Seen]:
    unnamed, named = ("LMUnexpectedError", None), ("LMUnsupportedFeatureError", None)
    same = case[0] == "text" and (theirs.came_back, ours.came_back) in [(unnamed, named), (("", unnamed), ("", named))]
    return (ours, ours) if same else (theirs, ours)


def _text_maximum(case: tuple[str, ...], theirs: Seen, ours: Seen) -> tuple[Seen, Seen]:
    meant = case[0] == "text" and case[1] in ("max_completion_tokens", "both maxima")
    refused = _REFUSED in (theirs.came_back, theirs.came_back[-1])
    return (ours, ours) if meant and refused and ours.arrived[0].body["max_tokens"] in (50, 60) else (theirs, ours)


def _no_logprobs(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _no_logprobs(v) for k, v in value.items() if k != "logprobs" or v not in (None, {"content": []})}
    if isinstance(value, (list, tuple)):
        return type(value)([_no_logprobs(each) for each in value])
    return value


def _without_logprobs(_: tuple[str, ...], theirs: Seen, ours: Seen) -> tuple[Seen, Seen]:
    def levelled(seen: Seen) -> Seen:
        return seen._replace(came_back=_no_logprobs(seen.came_back), history=_no_logprobs(seen.history))

    return levelled(theirs), levelled(ours)


_ID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def _anonymous(value: Any) -> Any:
    if isinstance(value, str):
        return _ID.sub("id", value)
    if isinstance(value, dict):
        return {key: _anonymous(each) for key, each in value.items()}
    return [_anonymous(each) for each in value] if isinstance(value, list) else value


def _clients_header(_: tuple[str, ...], theirs: Seen, ours: Seen) -> tuple[Seen, Seen]:
    def levelled(seen: Seen) -> Seen:
        kinds = (None, "application/octet-stream")
        return seen._replace(
            arrived=[
                each._replace(headers=_without("content-type")(each.headers))
                if each.headers.get("content-type") in kinds
                else each
                for each in seen.arrived
            ]
        )

    return levelled(theirs), levelled(ours)


def _counted(history: dict[str, Any]) -> dict[str, Any]:
    usage = history["usage"] or {}
    counts = (
        usage.get("prompt_tokens", usage.get("input_tokens")),
        usage.get("completion_tokens", usage.get("output_tokens")),
    )
    return {**history, "usage": (*counts, usage.get("total_tokens"))}


def _silent(history: dict[str, Any]) -> dict[str, Any]:
    return {**history, "kwargs": _without("headers", "extra_headers")(history["kwargs"])}


def _found(history: dict[str, Any]) -> dict[str, Any]:
    return {**history, "keys": [key for key in history["keys"] if key != "cost_details"]}


MEANT: Final[list[Meant]] = [
    Meant("`n` answers are n calls: each is admitted, priced, kept and billed by itself, on every provider", _many),
    Meant("a stream is asked for its usage: the bill needs it", _bodies(_without("stream_options"))),
    Meant("how a cost was found is told on LiteLLM's route too", _told(_found)),
    Meant(
        "usage has DSPy's own fields on every engine, under their names, without those that LiteLLM adds",
        _told(_counted),
    ),
    Meant("headers may hold secrets, and stay out of the history", _told(_silent)),
    Meant("a cost is told where plain DSPy knows no price, and not told where tools are billed apart", _priced),
    Meant("what a text model cannot be sent is told by its name", _named),
    Meant("`max_completion_tokens` of a text model is its `max_tokens`", _text_maximum),
    Meant("no log-probabilities told are an empty list, as on the native engine", _without_logprobs),
    Meant("ids that LiteLLM draws at random", _bodies(_anonymous)),
    Meant("a header of LiteLLM's asynchronous client, for streams of Ollama", _clients_header),
]
"""Tried in order, until nothing differs."""
