"""`dspy-prod stop`, `resume`, `breaker` and `status`: what an operator says to all workers, and what holds now."""

from __future__ import annotations

import argparse
import datetime as dt
import re
from collections.abc import Callable
from typing import Any, Final

from dspy_prod.cli.printing import print_json, show
from dspy_prod.cli.reports import opened
from dspy_prod.errors import ConfigError
from dspy_prod.policies.breaker.transitions import OperatorMove
from dspy_prod.runtime.clock import SYSTEM_CLOCK
from dspy_prod.status.controls import Controls
from dspy_prod.status.costs import stored_budgets
from dspy_prod.status.models import CircuitHealth
from dspy_prod.status.spending import budgets_table
from dspy_prod.stores.board import Note
from dspy_prod.views import Cell, Table

JOURNAL: Final = 10
"""Lines of the journal that `status` shows, unless told otherwise."""
MOST_BUDGETS: Final = 10

_MOVES: Final[dict[str, OperatorMove]] = {"open": "force_open", "close": "disable", "reset": "reset"}
_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}

Where = Callable[[argparse.ArgumentParser], None]


def add_parsers(commands: Any, where: Where) -> None:
    """Add the commands to those of `dspy-prod`; `where` adds the arguments that name a store."""
    status = commands.add_parser("status", help="what is stopped, circuits, budgets, and what was done last")
    where(status)
    status.add_argument("--limit", type=int, default=JOURNAL, help="lines of the journal (default: %(default)s)")
    status.set_defaults(run=_status)

    stop = commands.add_parser("stop", help="send nothing more for a program, a model, a tenant or at all")
    _whom(stop)
    where(stop)
    stop.add_argument("--reason", default="", help="for callers and the journal")
    stop.add_argument("--for", dest="duration", metavar="TIME", help="30s, 10m, 2h, 1d; default: until `resume`")
    stop.set_defaults(run=_stop)

    resume = commands.add_parser("resume", help="let go on what was stopped")
    _whom(resume)
    where(resume)
    resume.set_defaults(run=_resume)

    breaker = commands.add_parser("breaker", help="move the circuit breakers of a route in every worker")
    breaker.add_argument(
        "move", choices=_MOVES, help="open: refuse every call; close: admit every call and count none; reset: as usual"
    )
    breaker.add_argument("route", metavar="ROUTE", help="a model, or its address and model as `status` shows it")
    where(breaker)
    breaker.add_argument("--reason", default="", help="for callers and the journal")
    breaker.set_defaults(run=_breaker)


def _whom(parser: argparse.ArgumentParser) -> None:
    whom = parser.add_mutually_exclusive_group(required=True)
    whom.add_argument("--program", help="a Production's name, or that of call_context(program=...)")
    whom.add_argument("--model", help="a model; calls go on with their fallbacks")
    whom.add_argument("--tenant", help="as in call_context(tenant=...)")
    whom.add_argument("--all", action="store_true", help="all calls of the namespace")


def _named(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "program": arguments.program, "model": arguments.model, "tenant": arguments.tenant,
        "everything": arguments.all,
    }  # fmt: skip


def _stop(arguments: argparse.Namespace) -> int:
    duration = _seconds(arguments.duration)
    controls, named = Controls(opened(arguments)), _named(arguments)
    stop = controls.stop(**named, reason=arguments.reason, duration=duration)
    doubt = "" if named.pop("everything") else controls.doubt(**named)
    if arguments.json:
        return print_json({**stop.model_dump(mode="json"), "doubt": doubt})
    return show(f"{stop.told()}. Every worker obeys before its next call.", *_doubtful(doubt))


def _resume(arguments: argparse.Namespace) -> int:
    controls = Controls(opened(arguments))
    found = controls.resume(**_named(arguments))
    if arguments.json:
        return print_json({"resumed": found})
    left = [stop.told() for stop in controls.stops()]
    said = "Calls go on." if found else "Nothing of that was stopped."
    return show(said, *(f"Still: {each}" for each in left))


def _breaker(arguments: argparse.Namespace) -> int:
    move = _MOVES[arguments.move]
    controls = Controls(opened(arguments))
    controls.breaker(move, arguments.route, arguments.reason)
    doubt = controls.doubt(route=arguments.route)
    if arguments.json:
        return print_json({"route": arguments.route, "move": move, "reason": arguments.reason, "doubt": doubt})
    said = {
        "force_open": "refuse every call until `reset` or `close`",
        "disable": "admit every call and count none until `reset` or `open`",
        "reset": "are closed, and count from nothing",
    }
    return show(f"The circuits of {arguments.route} {said[move]}, in every worker.", *_doubtful(doubt))


def _doubtful(doubt: str) -> list[str]:
    return [f"Nothing may come of it: {doubt[0].lower()}{doubt[1:]}."] if doubt else []


def _status(arguments: argparse.Namespace) -> int:
    """Print what holds in a namespace now."""
    if arguments.limit < 0:
        raise ConfigError(f"--limit {arguments.limit} must be at least 0")
    store = opened(arguments)
    controls = Controls(store)
    stops, circuits = controls.stops(), controls.circuits()
    journal = controls.journal(arguments.limit) if arguments.limit else []
    budgets = stored_budgets(store, SYSTEM_CLOCK, MOST_BUDGETS)
    if arguments.json:
        return print_json(
            {
                "store": store.url,
                "namespace": store.namespace,
                "stops": [each.model_dump(mode="json") for each in stops],
                "circuits": [each.model_dump(mode="json") for each in circuits],
                "budgets": [each.model_dump(mode="json") for each in budgets],
                "journal": [{**each._asdict(), "at": _time(each.at)} for each in journal],
            }
        )
    rows = [(Cell(each.target, "bad"), each.reason, each.by, _stamp(each.since), _stamp(each.until)) for each in stops]
    shown: list[Any] = [f"Namespace {store.namespace!r} of {store.url}"]
    shown.append(Table("Stopped", ("what", "reason", "by", "since", "until"), rows) if rows else "Nothing is stopped.")
    if circuits:
        shown.append(circuits_table(circuits))
    if budgets:
        shown.append(budgets_table(budgets))
    if journal:
        shown.append(journal_table(journal))
    return show(*shown)


def circuits_table(circuits: list[CircuitHealth]) -> Table:
    """Circuits that all workers share, as a table."""
    rows = []
    for each in circuits:
        later = "" if not each.retry_after else f"{each.retry_after:.0f} s"
        tone: Any = "" if each.state in ("closed", "disabled") else "bad"
        cause = each.cause if not each.by else f"{each.cause} ({each.by})"
        rows.append((each.route, Cell(each.state.replace("_", " "), tone), cause, later, str(each.probes)))
    return Table("Circuits of all workers", ("route", "state", "cause", "may be tried in", "probes"), rows)


def journal_table(journal: list[Note]) -> Table:
    """What was done, as a table."""
    rows = [(_time(each.at), each.what, each.target, each.by, each.reason) for each in journal]
    return Table("Done last", ("when (UTC)", "what", "of", "by", "reason"), rows)


def _time(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.timezone.utc).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")


def _stamp(at: dt.datetime | None) -> str:
    return "resumed" if at is None else _time(at.timestamp())


def _seconds(given: str | None) -> float | None:
    if given is None:
        return None
    found = re.fullmatch(r"(\d{1,6}) ?([smhdw])", given)
    if not found or int(found[1]) == 0:
        raise ConfigError(f"--for {given!r}: write 30s, 10m, 2h or 1d")
    return float(int(found[1]) * _UNITS[found[2]])
