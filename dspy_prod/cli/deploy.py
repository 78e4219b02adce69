"""`dspy-prod deploy`: gate, publish and promote in one command, for CI."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any, Final

from dspy_prod import registry
from dspy_prod.cli.printing import print_json, show
from dspy_prod.privacy.outward import outward
from dspy_prod.privacy.visible import visible
from dspy_prod.registry.deployment.report import DIRECTORY
from dspy_prod.registry.errors import Unfinished

DEPLOYED, FAILED, INCONCLUSIVE, CONFLICT = 0, 1, 3, 4
OTHER: Final = 2
_CODES: Final = """exit codes:
  0  deployed (with --canary: up to canary), or there was nothing to do
  1  the gate failed or had an error; nothing was moved
  2  anything else: a wrong argument, an unknown version, MLflow does not answer
  3  the gate is inconclusive; a person may go on with --force --reason
  4  somebody else moved an alias meanwhile

A run that broke off is continued by the same command, on any machine."""


def add_parser(commands: Any) -> None:
    """Add the command to those of `dspy-prod`."""
    parser = commands.add_parser(
        "deploy", help="take a candidate through its gate, and up to production", epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("name", help="the program")
    parser.add_argument(
        "--candidate", required=True, help="a version number, an alias, or a .json that program.save(...) wrote"
    )
    parser.add_argument(
        "--eval", required=True, type=Path, metavar="FILE.py",
        help="defines evaluate(program), PROGRAM or program(), THRESHOLDS, and perhaps BASELINE, MARGIN, MIN_EXAMPLES",
    )  # fmt: skip
    parser.add_argument("--stages", default="staging,canary,production", help="aliases in order (default: %(default)s)")
    parser.add_argument(
        "--canary", action="store_true", help="stop when the alias canary has moved: an experiment decides from there"
    )
    parser.add_argument("--recheck", action="store_true", help="start over, with a new evaluation")
    parser.add_argument("--force", action="store_true", help="overrule an inconclusive gate; needs --reason")
    parser.add_argument("--reason", help="why, for the audit log")
    parser.add_argument("--report", type=Path, default=DIRECTORY, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--tracking-uri", help="the MLflow store; default: MLflow's own ($MLFLOW_TRACKING_URI)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Deploy; returns the exit code."""
    from dspy_prod.cli.eval_file import read

    # What the evaluation prints must not get between a program and its JSON.
    apart = contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext()
    try:
        with apart:
            deployment = registry.deploy(
                arguments.name, arguments.candidate, **vars(read(arguments.eval)),
                stages=[stage.strip() for stage in arguments.stages.split(",") if stage.strip()],
                until="canary" if arguments.canary else None, recheck=arguments.recheck,
                force=arguments.force, reason=arguments.reason,
                report_dir=arguments.report, display_progress=sys.stderr.isatty(),
                tracking_uri=arguments.tracking_uri,
            )  # fmt: skip
    except registry.RegistryError as error:
        print(visible(outward(f"dspy-prod deploy: {error}")), file=sys.stderr)
        if error.deployment is not None:
            _show(arguments, error.deployment)
        return _code(error)
    _show(arguments, deployment)
    return DEPLOYED


def _code(error: registry.RegistryError) -> int:
    if isinstance(error, registry.PromotionRefusedError):
        return INCONCLUSIVE if error.report.result == "inconclusive" else FAILED
    return CONFLICT if isinstance(error, registry.PromotionConflictError) else OTHER


def _show(arguments: argparse.Namespace, deployment: Unfinished) -> None:
    if arguments.json:
        print_json(deployment.to_dict())
        return
    show(deployment, *([f"Report: {', '.join(deployment.files)}"] if deployment.files else []))
