"""`dspy-prod optimizations`: what optimizers were run under a budget, how they go, and an end to them."""

from __future__ import annotations

import argparse
import datetime as dt
from collections.abc import Callable
from typing import Any, Final

from dspy_prod.cli.printing import print_json, show
from dspy_prod.cli.reports import opened
from dspy_prod.errors import ConfigError
from dspy_prod.optimize.headers import Header, ask_to_stop, load, names, quoted, remove, sound
from dspy_prod.policies.run import accounts_of
from dspy_prod.privacy.outward import outward
from dspy_prod.privacy.visible import carried
from dspy_prod.records import NANO
from dspy_prod.stores.base import Size, Store
from dspy_prod.views import Table

_NONE: Final = "-"
_NOTHING: Final = Size(0, 0)
_MOST: Final = 10
"""Names that an error tells."""


def add_parser(commands: Any, where: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the command to those of `dspy-prod`; `where` adds the arguments that name a store."""
    parser = commands.add_parser("optimizations", help="optimizers that were run under a budget: list, show, stop, rm")
    parser.add_argument("action", nargs="?", default="list", choices=("list", "show", "stop", "rm"))
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the run; for all but list")
    parser.add_argument("--force", action="store_true", help="with rm: also while it is running")
    where(parser)
    parser.set_defaults(run=run)
    parse = parser.parse_known_args

    def with_late_name(*arguments: Any) -> tuple[argparse.Namespace, list[str]]:
        """A name that stands behind an option, as in `show --json NAME`: argparse takes it for one too many."""
        found, rest = parse(*arguments)
        if found.name is None and len(rest) == 1 and not rest[0].startswith("-"):
            found.name, rest = rest[0], []
        return found, rest

    parser.parse_known_args = with_late_name


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit code."""
    action, name = arguments.action, arguments.name
    if (action == "list") != (name is None):
        example = "dspy-prod optimizations" if action == "list" else f"dspy-prod optimizations {action} NAME"
        raise ConfigError(f"write {example}{'' if action == 'list' else '; dspy-prod optimizations lists the names'}")
    store = opened(arguments)
    if action == "list":
        return _list(store, arguments.json)
    name, known = carried(name), names(store)
    if name not in known:
        told = ", ".join(map(repr, known[:_MOST])) or "none yet"
        more = f" and {len(known) - _MOST:,} more" if len(known) > _MOST else ""
        raise ConfigError(f"there is no optimization {name!r} in namespace {store.namespace!r}, only {told}{more}")
    try:
        header = load(store, name)
    except ConfigError:  # it is damaged, which is no reason to keep it
        if action != "rm":
            raise
        header = None
    if action == "show":
        return _show(store, name, header, arguments.json)
    if action == "stop":
        return _stop(store, name, header, arguments.json)
    return _remove(store, name, header, arguments.force, arguments.json)


def _list(store: Store, as_json: bool) -> int:
    sizes = store.runs.sizes()
    found, damaged = sound(store)
    found += [Header(run=name, optimizer=_NONE, state="damaged", started_at=0.0) for name in damaged]
    known = {header.run for header in found}
    found += [Header(run=name, optimizer=_NONE, state=_NONE, started_at=0.0) for name in sizes if name not in known]
    if as_json:
        return print_json([_row_as_json(store, header, sizes.get(header.run, _NOTHING)) for header in found])
    if not found:
        return show(f"No optimization is known in namespace {store.namespace!r}.")
    columns = ("name", "optimizer", "state", "began", "score", "USD", "of", "answers")
    rows = [_row(store, header, sizes.get(header.run, _NOTHING)) for header in found]
    return show(Table(f"Optimizations in {store.namespace!r}", columns, rows, numbers=4))


def _row(store: Store, header: Header, size: Size) -> tuple[str, ...]:
    cap = header.caps.get("usd")
    return (
        header.run,
        header.optimizer,
        header.shown_state,
        _when(header.started_at),
        _NONE if header.score is None else f"{header.score:g}",
        f"{_spent(store, header):.6f}",
        _NONE if cap is None else f"{cap:g}",
        f"{size.answers:,}",
    )


def _row_as_json(store: Store, header: Header, size: Size) -> dict[str, Any]:
    return {
        "run": header.run,
        "optimizer": header.optimizer,
        "state": header.shown_state,
        "started_at": header.started_at or None,
        "ended_at": header.ended_at,
        "score": header.score,
        "spent_usd": _spent(store, header),
        "caps": dict(header.caps),
        "answers": size.answers,
        "bytes": size.bytes,
    }


def _show(store: Store, name: str, header: Header | None, as_json: bool) -> int:
    size = store.runs.sizes(name).get(name, _NOTHING)
    header = header or Header(run=name, optimizer=_NONE, state=_NONE, started_at=0.0)
    if as_json:
        return print_json({**header.to_dict(), **_row_as_json(store, header, size)})
    described = header.described
    rows: list[tuple[str, str]] = [
        ("optimizer", header.optimizer),
        ("state", header.shown_state),
        ("began", _when(header.started_at)),
        *([("ended", _when(header.ended_at))] if header.ended_at is not None else []),
        ("spent", f"{_spent(store, header):.6f} USD"),
        *[(f"cap, {each}", f"{value:g}" if isinstance(value, (int, float)) else str(value))
          for each, value in header.caps.items() if value is not None],
        *([("best score", f"{header.score:g}")] if header.score is not None else []),
        *([("calls", f"{header.calls:,}")] if header.calls is not None else []),
        *([("replayed", f"{header.replayed:,}")] if header.replayed is not None else []),
        ("answers kept", f"{size.answers:,}, {size.bytes / 1e6:.1f} MB"),
        *[(each, f"{len(examples):,} examples") for each, examples in (described.get("datasets") or {}).items()],
        *[(f"LM, {role}", str(lm.get("model"))) for role, lm in (described.get("lms") or {}).items()],
        *[(f"seed, {each}", str(value)) for each, value in header.seeds.items()],
        *[(each, str(version)) for each, version in (described.get("versions") or {}).items()],
    ]  # fmt: skip
    told: list[str] = [f"Warning: {outward(warning)}" for warning in header.warnings]
    if header.shown_state in ("killed", "interrupted", "stopped", "failed", "budget", "calls", "tokens", "time"):
        told.append(f"Go on where it was: BudgetedOptimizer(..., name={name!r}).compile(..., resume=True)")
    return show(Table(f"{name}, in {store.url}", ("", ""), [(one, outward(str(two))) for one, two in rows]), *told)


def _stop(store: Store, name: str, header: Header | None, as_json: bool) -> int:
    if header is None or not header.running:
        how = "it keeps answers, and nobody said that it is one" if header is None else f"it is {header.shown_state}"
        raise ConfigError(f"the optimization {name!r} is not running: {how}")
    ask_to_stop(store, name)
    if as_json:
        return print_json({"run": name, "asked_to_stop": True})
    return show(f"{name} is asked to stop; it returns the best so far.")


def _remove(store: Store, name: str, header: Header | None, force: bool, as_json: bool) -> int:
    if header is not None and header.running and not force:
        raise ConfigError(
            f"the optimization {name!r} is running. End it first, dspy-prod optimizations stop {quoted(name)}, or say "
            "--force"
        )
    answers = store.runs.count(name)
    running = header is not None and header.running
    remove(store, name, running=running)
    if as_json:
        return print_json({"run": name, "removed": True, "answers": answers})
    asked = " It is asked to stop, and what it spent stays counted." if running else ""
    return show(f"{name} is removed, with {answers:,} kept answers. The ledger still has what it cost.{asked}")


def _spent(store: Store, header: Header) -> float:
    """What its account says, where it has one: a killed process could not write its header any more."""
    return store.account(accounts_of(header.run) + "usd").spent / NANO or header.spent_usd


def _when(at: float) -> str:
    return dt.datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M") if at else _NONE
