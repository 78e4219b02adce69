"""`dspy-prod check prod.toml`: would keys, addresses, prices, limits, budgets and the store do? Without spending."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any, Final

from dspy_prod.cli.printing import print_json, show
from dspy_prod.views import Cell, Table
from dspy_prod.views.cells import Tone

_TONES: Final[dict[str, Tone]] = {"ok": "good", "unsure": "warn", "not tried": "faint", "fails": "bad"}


def add_parser(commands: Any) -> None:
    """Add the command to those of `dspy-prod`."""
    parser = commands.add_parser(
        "check", help="try a configuration file without spending; exit code 1 if it would fail"
    )
    parser.add_argument("path", nargs="?", type=Path, help="the TOML file; default: DSPY_PROD__... variables alone")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 1 when something would fail."""
    from dspy_prod.config.examining import examined
    from dspy_prod.errors import ConfigError, StoreUnavailableError
    from dspy_prod.lm.checking import Finding

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = examined(arguments.path)
    except (ConfigError, StoreUnavailableError) as error:
        what = "store" if isinstance(error, StoreUnavailableError) else "configuration"
        found = [Finding(route=str(arguments.path or "environment"), what=what, outcome="fails", detail=str(error))]
    fails = any(finding.outcome == "fails" for finding in found)
    if arguments.json:
        print_json([finding.model_dump(mode="json") for finding in found])
        return int(fails)
    several = any(one.of for one in found)
    rows = [
        (*((one.of,) if several else ()), one.route, one.what, Cell(one.outcome, _TONES[one.outcome]), one.detail)
        for one in found
    ]
    columns = (*(("in the file",) if several else ()), "route", "what", "outcome", "found")
    show(Table(str(arguments.path or "environment"), columns, rows))
    return int(fails)
