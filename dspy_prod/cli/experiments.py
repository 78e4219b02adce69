"""`dspy-prod experiment`: online experiments, for operators who have the store and not the program's code."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.cli.experiment_running import check_registry, tracking_into
from dspy_prod.cli.experiment_tables import listed, status
from dspy_prod.cli.printing import print_json, show
from dspy_prod.cli.reports import opened as opened_store
from dspy_prod.errors import ConfigError
from dspy_prod.privacy.outward import outward
from dspy_prod.privacy.visible import visible
from dspy_prod.registry.errors import PromotionConflictError

if TYPE_CHECKING:
    from dspy_prod.experiments.opened import Opened

DIRECTORY: Final = Path(".dspy_prod") / "experiments"
DONE, WORSE, OTHER, UNPROVEN, CONFLICT = 0, 1, 2, 3, 4
_CODES: Final = """exit codes:
  0  done, or there was nothing to do
  1  promote: the candidate is proven worse
  2  anything else: a wrong argument, no such experiment, the store or MLflow does not answer
  3  promote: the evidence does not say so; a person may go on with --variant --force --reason
  4  promote: somebody else moved the alias meanwhile"""
_STATES: Final = {"start": "running", "pause": "paused", "resume": "running", "stop": "stopped"}
_DONE: Final = {"start": "is started", "pause": "is paused", "resume": "goes on", "stop": "is stopped"}


def add_parser(commands: Any, where: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the command to those of `dspy-prod`; `where` adds the arguments that name a store."""
    parser = commands.add_parser(
        "experiment", help="online experiments: how they stand, and what to do with them", epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, help: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = actions.add_parser(name, help=help)
        if name != "list":
            made.add_argument("name", metavar="NAME", help="of the experiment")
        where(made)
        made.set_defaults(run=run)
        return made

    action("list", "all experiments", _list)
    plan = action("plan", "how many users and days it takes to decide", _plan)
    plan.add_argument(
        "--users-per-day", type=float, required=True, metavar="N", help="new ones, of all variants together"
    )
    plan.add_argument(
        "--baseline", action="append", default=[], metavar="METRIC=MEAN[,SD]",
        help="control's mean, and standard deviation, of a metric; may be repeated",
    )  # fmt: skip
    plan.add_argument(
        "--effect", action="append", default=[], metavar="METRIC=NUMBER",
        help="by how much a candidate is hoped to be better on a success metric; may be repeated",
    )  # fmt: skip
    plan.add_argument("--power", type=float, default=0.8, help="probability of being done by then (default: 0.8)")
    looking = [
        action("status", "how it stands: stage, users, evidence, and what was decided", _status),
        action("report", "write the scorecard as a page", _report),
        action("step", "look once: take in what has come, decide, act; for cron", _step),
        action("run", "look every so often until it is decided or stopped", _run),
        action("promote", "give a candidate to everybody, and its version control's alias", _promote),
    ]
    for each in looking:
        each.add_argument(
            "--tracking-uri", help="the MLflow store with its versions; default: where they were found, else MLflow's"
        )
    _, report, step, run, promote = looking
    for each in (step, run):
        each.add_argument(
            "--tracking-experiment", metavar="NAME",
            help="also write the runs of the variants into this experiment of MLflow's, made when there is none",
        )  # fmt: skip
    report.add_argument("--out", type=Path, metavar="FILE", help=f"default: {DIRECTORY}/NAME.html")
    run.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help="between two looks (default: 10)")
    promote.add_argument("--variant", help="the candidate; default: the one that is proven better")
    promote.add_argument(
        "--force", action="store_true", help="although the evidence does not say so; needs --variant and --reason"
    )
    promote.add_argument("--reason", help="why, for the audit")
    for name, help in (
        ("start", "begin the rollout"),
        ("pause", "let nobody new into a candidate, and decide nothing"),
        ("resume", "go on after a pause"),
        ("stop", "end it: everybody gets control, and the candidates' aliases its version"),
    ):
        action(name, help, _put).add_argument("--reason", help="why, for the audit")
    remove = action("rm", "forget it, with all that was measured", _remove)
    remove.add_argument("--force", action="store_true", help="also while it is running or paused")


def _list(arguments: argparse.Namespace) -> int:
    from dspy_prod.experiments.listing import listing

    store = opened_store(arguments)
    rows = listing(store.trials)
    if arguments.json:
        return print_json([row.to_dict() for row in rows])
    if not rows:
        return show(f"No experiment is known in namespace {store.namespace!r}.")
    return show(listed(rows, f"Experiments in {store.namespace!r}"))


def _status(arguments: argparse.Namespace) -> int:
    opened = _opened(arguments)
    return print_json(opened.to_dict()) if arguments.json else show(*status(opened))


def _plan(arguments: argparse.Namespace) -> int:
    from dspy_prod.registry.files import plain

    baseline = {name: _numbers("--baseline", text, 2) for name, text in map(_pair, arguments.baseline)}
    effects = {name: _numbers("--effect", text, 1)[0] for name, text in map(_pair, arguments.effect)}
    found = _opened(arguments).plan(
        arguments.users_per_day, baseline={name: (each[0], each[1]) if each[1:] else each[0] for name, each in
                                           baseline.items()},
        effect=effects, power=arguments.power,
    )  # fmt: skip
    return print_json(plain(found)) if arguments.json else show(found)


def _pair(text: str) -> tuple[str, str]:
    name, _, numbers = text.rpartition("=")
    return name, numbers


def _numbers(option: str, text: str, most: int) -> list[float]:
    try:
        found = [float(each) for each in text.split(",")]
    except ValueError:
        found = []
    if not 1 <= len(found) <= most:
        raise ConfigError(f"{option}: {text!r} is no number; write it as {option} resolved=0.8")
    return found


def _report(arguments: argparse.Namespace) -> int:
    opened = _opened(arguments)
    path = arguments.out or DIRECTORY / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', opened.name).strip('.-') or 'report'}.html"
    card = opened.scorecard()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        card.to_html(path)
    except OSError as error:
        raise ConfigError(f"--out {path}: {error.strerror or error}") from error
    return print_json({"experiment": opened.name, "file": str(path)}) if arguments.json else show(f"Report: {path}")


def _step(arguments: argparse.Namespace) -> int:
    opened = _opened(arguments)
    check_registry(opened)
    with tracking_into(opened, arguments.tracking_experiment, arguments.tracking_uri):
        looked = opened.controller.step() is not None
    if arguments.json:
        return print_json({**opened.to_dict(), "looked": looked})
    if not looked:
        return show(f"Another controller is looking at {opened.name}.")
    return show(_line(opened))


def _run(arguments: argparse.Namespace) -> int:
    from dspy_prod.cli.experiment_running import running

    opened = _opened(arguments)
    with tracking_into(opened, arguments.tracking_experiment, arguments.tracking_uri):
        return running(opened, arguments.every, arguments.json, _line)


def _promote(arguments: argparse.Namespace) -> int:
    from dspy_prod.experiments.operating import promote
    from dspy_prod.registry.aliases.gates import PromotionRefusedError
    from dspy_prod.registry.published.provenance import author

    opened = _opened(arguments)
    if arguments.force and not (arguments.reason and arguments.variant):
        raise ConfigError("promote --force needs --variant and --reason, which are kept in the audit")
    try:
        promote(opened, arguments.variant, force=arguments.force, reason=arguments.reason, by=author())
    except PromotionRefusedError as error:
        return _failed(error, WORSE if error.report.result == "fail" else UNPROVEN)
    except PromotionConflictError as error:
        return _failed(error, CONFLICT)
    return print_json(opened.to_dict()) if arguments.json else show(_line(opened))


def _put(arguments: argparse.Namespace) -> int:
    from dspy_prod.experiments.operating import put, stop
    from dspy_prod.registry.published.provenance import author

    opened, what, by = _opened(arguments), arguments.action, author()
    if what == "stop":
        changed = stop(opened, arguments.reason, by)
    else:
        changed = put(opened.trials, opened.name, what, arguments.reason, by)
    state = opened.trial().state
    if changed is None and state != _STATES[what]:
        raise ConfigError(f"the experiment {opened.name!r} is {state}; there is nothing to {what}")
    if arguments.json:
        return print_json({"experiment": opened.name, "state": state, "changed": changed is not None})
    return show(f"{opened.name} {_DONE[what] if changed is not None else f'is {state} already'}.")


def _remove(arguments: argparse.Namespace) -> int:
    from dspy_prod.experiments.operating import remove

    store, name = opened_store(arguments), arguments.name
    if store.trials.trial(name) is None:
        _opened(arguments)  # which says which there are
    remove(store.trials, name, force=arguments.force)
    if arguments.json:
        return print_json({"experiment": name, "removed": True})
    return show(f"{name} is removed, with all that was measured. Processes that run it give control to everybody.")


def _opened(arguments: argparse.Namespace) -> Opened:
    from dspy_prod.experiments.opened import Opened

    uri = getattr(arguments, "tracking_uri", None)
    return Opened(opened_store(arguments), arguments.name, uri)


def _line(opened: Opened) -> str:
    """How an experiment stands, in a line."""
    from dspy_prod.experiments.aliases import ALIAS

    card = opened.scorecard()
    lines = [each for each in opened.trials.decisions(opened.name) if each.what != ALIAS]
    ended = bool(lines) and card.state in ("decided", "stopped", "paused")
    done = f" ({lines[-1].what} by {lines[-1].by})" if ended else ""
    serves = f", everybody gets {card.serves}" if card.serves else ""
    return f"{card.name}: {card.state}{done}, stage {card.stage}{serves}. {card.decision}: {card.reason}"


def _failed(error: Exception, code: int) -> int:
    print(visible(outward(f"dspy-prod experiment: {error}")), file=sys.stderr)
    return code
