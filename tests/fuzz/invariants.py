"""What must hold after every example, whatever a provider, a file or a caller said: each rule is one function.

Each raises `Violation`, whose `kind` is the name of the rule.
"""

from __future__ import annotations

import json
import re
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from traceback import walk_tb
from typing import Any, Final

from dspy.utils.exceptions import LMError

from dspy_prod import CallRecord, ConfigError
from dspy_prod.pipeline.upstream.ends import causes_of
from dspy_prod.registry.errors import RegistryError
from dspy_prod.runtime.reaper import REAPER
from tests.fuzz.exchange import Exchange
from tests.fuzz.secrets import HEADER, SECRET

INPUT: Final = 1_000
OUTPUT: Final = 2_000
"""Nano-USD per token, of every model that is fuzzed."""

_ANSWER: Final = re.compile(r"answer (\d{4}) (\d{4})")
_FREE: Final = frozenset({500, 503, 529}) | (frozenset(range(300, 500)) - {303, 408})
"""Statuses of answers for which nobody pays."""


class Violation(AssertionError):
    """A rule does not hold.

    Attributes:
        kind: the rule.
    """

    def __init__(self, kind: str, said: str) -> None:
        super().__init__(f"{kind}: {said}")
        self.kind = kind


def typed(error: BaseException) -> None:
    """Every failure is one of the documented classes."""
    if not isinstance(error, (LMError, ConfigError, RegistryError)) and not _of_plain(error):
        trace = "".join(traceback.format_exception(error)[-6:])
        raise Violation("typed error", f"{type(error).__module__}.{type(error).__qualname__}: {error!r:.300}\n{trace}")


def _of_plain(error: BaseException) -> bool:
    """Whether DSPy's own constructor refused the model, as it does for a plain `dspy.LM`."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return isinstance(error, ValueError) and frame.f_code.co_filename.replace("\\", "/").endswith("dspy/clients/lm.py")


def nothing_held(lm: Any) -> None:
    """No money, seat, permit or flight is kept for a call that has ended."""
    pipeline = lm.pipeline
    store = pipeline.store
    held = {"holds": store.holds(), "waiting": store.waiting(), "flights": len(pipeline.flights)}
    for route in pipeline.routes:
        if route.breaker is not None:
            held["probes"] = held.get("probes", 0) + route.breaker.snapshot().probes_in_flight
        limiter = store.limiter(route.limit_key)
        if limiter is not None:
            held["seats"] = held.get("seats", 0) + limiter.in_flight
    if any(held.values()):
        if REAPER.flush() and not (store.holds() or store.waiting() or len(pipeline.flights)):
            return
        raise Violation("nothing held", str({name: count for name, count in held.items() if count}))


def charged(exchanges: Sequence[Exchange], records: Iterable[CallRecord], bound: int) -> None:
    """Each attempt that reached a connection is charged exactly once: what was told, or its bound, or rightly nothing.

    Args:
        exchanges: what the connections brought, in order.
        records: the ledger's, of the same calls.
        bound: the most an attempt may cost, in nano-USD.
    """
    mine = [record for record in records if not record.cached and record.outcome != "refused"]
    while len(mine) > len(exchanges) and mine[-1].outcome == "cancelled":
        mine.pop()  # left on its way to the connection: it may have been sent, and is charged its bound
    if len(mine) > len(exchanges):
        raise Violation("one charge", _pairs(exchanges, mine))
    found = [_problems(some, mine, bound) for some in _without_own(exchanges, len(exchanges) - len(mine))]
    if not found:
        raise Violation("one charge", _pairs(exchanges, mine))
    if all(found):
        raise Violation("charge", f"{found[0]}; bound {bound}")


def _without_own(exchanges: Sequence[Exchange], count: int) -> Iterator[Sequence[Exchange]]:
    """The exchanges without so many that LiteLLM's clients began for the same attempt as the next one.

    They connect once more where they were not connected, and follow a provider that sends them on to itself; that they
    go nowhere else is another rule, `at_home`.
    """
    own = [
        place
        for place, each in enumerate(exchanges[:-1])
        if each.end == "refused" or each.status in (301, 302, 303, 307, 308)
    ]
    for left_out in combinations(own, count):
        yield [
            _fetched(each) if _was_taken(exchanges, place, left_out) else each
            for place, each in enumerate(exchanges)
            if place not in left_out
        ]


def _was_taken(exchanges: Sequence[Exchange], place: int, left_out: Sequence[int]) -> bool:
    """Whether an exchange of the same attempt's, just before that one, says that its question was taken."""
    while (place := place - 1) in left_out:
        if exchanges[place].status in (301, 302, 303):
            return True
    return False


def _fetched(exchange: Exchange) -> Exchange:
    """Where the answer to a question that was taken before is fetched: nobody there, nobody knows what it came to."""
    return replace(exchange, end="reset", status=None) if exchange.end == "refused" else exchange


def _problems(exchanges: Sequence[Exchange], records: Sequence[CallRecord], bound: int) -> str | None:
    for exchange, record in zip(exchanges, records, strict=True):
        problem = _problem(exchange, record, bound)
        if problem is not None:
            return f"{problem}; {exchange.told=}, {exchange.status=}, {record}"
    return None


def _pairs(exchanges: Sequence[Exchange], records: Sequence[CallRecord]) -> str:
    told = [(record.outcome, record.error, record.cost_nano) for record in records]
    return f"{len(exchanges)} connections, {len(records)} records: {told}"


def _problem(exchange: Exchange, record: CallRecord, bound: int) -> str | None:
    cost = record.cost_nano
    if cost is None:
        return "no cost"
    if record.estimated and cost != bound:
        return "an estimate is not the bound"
    told = [inputs * INPUT + outputs * OUTPUT for inputs, outputs in exchange.told]
    if cost > bound and cost not in told and None in (record.input_tokens, record.output_tokens):
        return "above the bound, and told by nobody"
    if exchange.end == "refused":
        return "charged, though never sent" if cost else None
    status = exchange.status
    if status is None or status < 200:
        return None if cost == bound or record.outcome == "ok" else "not its bound, though nobody knows"
    if status in _FREE:
        return "charged, though refused" if cost and exchange.clean else None
    if cost == 0:
        return "charged nothing"
    if status >= 300:
        return None if cost == bound else "not its bound, though nobody knows"
    if told and cost < min(told) and not (record.estimated and record.outcome in ("error", "cancelled")):
        return "below what was told"
    if told and record.outcome == "ok" and cost not in told:
        return "not what was told"
    return None


def no_secret(said: Iterable[Any]) -> None:
    """What leaves, in whatever form, shows no key and no header."""
    for each in said:
        if isinstance(each, BaseException):
            no_secret(_texts(each))
        elif (text := each if isinstance(each, str) else repr(each)) and (SECRET in text or HEADER in text):
            raise Violation("no secret", text[:600])


def _texts(error: BaseException) -> Iterable[Any]:
    for cause in causes_of(error):
        try:
            yield str(cause)
        except Exception as unreadable:
            raise Violation("readable", f"str() of {type(cause).__name__} raised {unreadable!r}") from cause
        yield cause.args
        yield [value for value in vars(cause).values() if isinstance(value, (str, tuple, dict, list))]


def bounded(seconds: float, most: float) -> None:
    """An example ends in time."""
    if seconds > most:
        raise Violation("time", f"took {seconds:.1f} s of {most:g}")


def at_home(reached: Iterable[tuple[str, int]], home: tuple[str, int]) -> None:
    """No connection goes anywhere but to the provider, wherever an answer points."""
    elsewhere = [place for place in reached if place != home]
    if elsewhere:
        raise Violation("at home", f"connected to {elsewhere} instead of {home} alone")


def stays(loaded: Mapping[str, Any], away: str) -> None:
    """Nothing that was loaded says that calls go elsewhere."""
    lm = loaded.get("lm")
    held = [repr(value) for name, value in loaded.items() if name != "lm"] + [repr(vars(lm)) if lm is not None else ""]
    if any(away in each for each in held):
        raise Violation("stays at home", f"{away} is in what was loaded: {held}")


def small(peak: int, most: int) -> None:
    """An example takes no more memory than what is read is bounded to."""
    if peak > most:
        raise Violation("memory", f"took {peak / 1e6:.0f} MB of {most / 1e6:.0f}")


def few_threads(most: int) -> None:
    """No example leaves threads behind."""
    if threading.active_count() > most:
        names = sorted(thread.name for thread in threading.enumerate())
        raise Violation("threads", f"{len(names)} of {most}: {names}")


def as_json(value: Any) -> None:
    """What the ledger tells can be written as JSON, in UTF-8."""
    try:
        json.dumps(value, default=str).encode()
    except Exception as error:
        raise Violation("plain data", f"{error!r} of {value!r:.300}") from error


def own_answer(answer: Any, number: int) -> None:
    """An answer is the one to this question, not to another."""
    for found, again in _ANSWER.findall(repr(answer)):
        if found == again and int(found) != number:  # else a byte of it was changed on the way
            raise Violation("own answer", f"answer {found} to question {number:04d}")


def booked(spent: int, records: Iterable[CallRecord]) -> None:
    """The account of a budget is charged what the records say."""
    costs = sum(record.cost_nano or 0 for record in records)
    if spent != costs:
        raise Violation("booked", f"{spent} nano-USD on the account, {costs} in the records")
