"""`dspy-prod grafana`: the dashboard for Grafana and the rules for Prometheus that come with the package."""

from __future__ import annotations

import argparse
import sys
from importlib.resources import files
from typing import Any, Final

from dspy_prod.cli.printing import print_json

DASHBOARD: Final = "dspy_prod.json"
RULES: Final = "alerts.yml"


def add_parser(commands: Any) -> None:
    """Add the command to those of `dspy-prod`."""
    grafana = commands.add_parser("grafana", help="print the dashboard for Grafana, or the rules for Prometheus")
    grafana.add_argument("--rules", action="store_true", help="alert rules for Prometheus (YAML), not the dashboard")
    grafana.add_argument("--json", action="store_true", help="print {name, text}")
    grafana.set_defaults(run=_grafana)


def shipped(name: str) -> str:
    """A file of those that come with the package, as it is there."""
    return files("dspy_prod").joinpath(f"metrics/grafana/{name}").read_text("utf-8")


def _grafana(arguments: argparse.Namespace) -> int:
    name = RULES if arguments.rules else DASHBOARD
    text = shipped(name)
    if arguments.json:
        return print_json({"name": name, "text": text})
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
    sys.stdout.flush()  # a closed pipe is met here, not at exit
    return 0
