"""The `dspy-prod` command: what operators do from a shell, on top of everything else.

Arguments in, tables or `--json` out. What a command finds or does belongs in the room it calls.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    if isinstance(sys.stdout, io.TextIOWrapper):  # what its encoding lacks is escaped, and never an error
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    from dspy_prod.cli import reports
    from dspy_prod.errors import ConfigError, RejectedError
    from dspy_prod.privacy.outward import outward
    from dspy_prod.privacy.visible import visible
    from dspy_prod.registry import RegistryError

    try:
        run = getattr(arguments, "run", None) or getattr(reports, arguments.command)
        return int(run(arguments))
    except (RejectedError, ConfigError, RegistryError) as error:
        print(visible(outward(f"dspy-prod {arguments.command}: {error}")), file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 0


def _demo(arguments: argparse.Namespace) -> int:
    from dspy_prod.cli.demo.demo import demo

    where = None if arguments.no_mlflow else arguments.tracking_uri
    return demo(model=arguments.model, simulate=arguments.simulate, as_json=arguments.json, tracking_uri=where)


class _Parser(argparse.ArgumentParser):
    """Shows what it was given and cannot use as what it is, as every command does."""

    def error(self, message: str) -> NoReturn:
        from dspy_prod.privacy.visible import visible

        super().error(visible(message))


def _parser() -> argparse.ArgumentParser:
    from dspy_prod import __version__
    from dspy_prod.cli.budgets import add_parser as add_budgets
    from dspy_prod.cli.check import add_parser as add_check
    from dspy_prod.cli.deploy import add_parser as add_deploy
    from dspy_prod.cli.experiments import add_parser as add_experiments
    from dspy_prod.cli.fleet import add_parsers as add_fleet
    from dspy_prod.cli.grafana import add_parser as add_grafana
    from dspy_prod.cli.optimizations import add_parser as add_optimizations
    from dspy_prod.cli.prompts import add_parsers as add_prompts

    parser = _Parser(prog="dspy-prod", description="Production safety for DSPy programs.")
    parser.add_argument("--version", action="version", version=f"dspy-prod {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="a support-triage program through load, outage, recovery and a budget")
    demo.add_argument("--model", help="run against this real model, e.g. openai/gpt-4o-mini (costs money)")
    demo.add_argument("--simulate", action="store_true", help="use the simulated provider, not the local model")
    demo.add_argument("--json", action="store_true", help="print the result as JSON")
    demo.add_argument(
        "--tracking-uri", default="sqlite:///mlflow.db", help="MLflow to write traces to (default: %(default)s)"
    )
    demo.add_argument("--no-mlflow", action="store_true", help="write no traces")
    demo.set_defaults(run=_demo)

    health = commands.add_parser("health", help="is the store all right, and what happened lately")
    _where(health)
    costs = commands.add_parser("costs", help="what was spent")
    _where(costs)
    costs.add_argument(
        "--by",
        default=None,
        help="day, model, user, tenant, program, experiment, variant, prompt, run, tag:<key>; default: a summary",
    )
    costs.add_argument(
        "--since", metavar="WHEN", help="7d, 2w, today or a date; whole days (UTC), by day unless --by says otherwise"
    )
    costs.add_argument(
        "--html", metavar="FILE", help="write a report with charts (30 days; by model, version, user, ..., or --by)"
    )
    programs = commands.add_parser("programs", help="how the calls of programs ended: answers, fallbacks, errors")
    _where(programs)
    programs.add_argument(
        "--by", default="program", help="program, tenant, experiment, variant, prompt, day, tag:<key>"
    )
    programs.add_argument("--since", metavar="WHEN", help="7d, 2w, today or a date; whole days (UTC)")
    calls = commands.add_parser("calls", help="the newest records of the ledger")
    _where(calls)
    calls.add_argument("--limit", type=int, help="how many (default 20; with --trace all)")
    for name in ("user", "tenant", "model", "outcome", "program", "experiment", "variant"):
        calls.add_argument(f"--{name}", help=f"only this {name}")
    calls.add_argument("--since", metavar="WHEN", help="30m, 12h, 7d, 2w, today, or a date (UTC) or time")
    calls.add_argument("--trace", metavar="TRACE_ID", help="only what belongs to this MLflow trace")
    calls.add_argument("--run", dest="of_run", metavar="NAME", help="only the calls of this run")
    calls.add_argument("--tag", metavar="NAME=VALUE", action="append", help="only calls with this tag; may be repeated")
    calls.add_argument("--prompt", metavar="VERSION", help="only this program version, e.g. triage/7")
    calls.add_argument("--unconfirmed", action="store_true", help="only costs that the provider did not confirm")
    add_fleet(commands, _where)
    add_budgets(commands, _where)
    add_optimizations(commands, _where)
    add_experiments(commands, _where)
    add_check(commands)
    add_grafana(commands)
    add_prompts(commands)
    add_deploy(commands)
    return parser


def _where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", help="store URL (default: $DSPY_PROD__STORE, $DSPY_PROD_STORE, else sqlite:///.dspy_prod/state.db)"
    )
    parser.add_argument(
        "--namespace", help="default: $DSPY_PROD__NAMESPACE, $DSPY_PROD_NAMESPACE, else the directory's name"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
