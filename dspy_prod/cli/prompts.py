"""`dspy-prod prompts`, `promote` and `rollback`: the program versions in MLflow."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dspy_prod import registry
from dspy_prod.cli.printing import print_json, show
from dspy_prod.errors import ConfigError
from dspy_prod.registry.aliases.listed import History, Versions

if TYPE_CHECKING:
    from dspy_prod.registry import AuditEntry


def add_parsers(commands: Any) -> None:
    """Add the three commands to those of `dspy-prod`."""
    prompts = commands.add_parser("prompts", help="published programs, or the versions of one")
    prompts.add_argument("name", nargs="?", help="the program; default: all programs, each with its newest version")
    prompts.add_argument("--history", action="store_true", help="the moves of its aliases instead of its versions")
    promote = commands.add_parser("promote", help="point an alias to a version of a program")
    promote.add_argument("name", help="the program")
    promote.add_argument("version", help="a version number, or name@alias")
    promote.add_argument("--expected", type=int, help="move only if the alias has this version now (0: none)")
    rollback = commands.add_parser("rollback", help="take the last promotion of an alias back")
    rollback.add_argument("name", help="the program")
    rollback.add_argument("--to", type=int, help="the version to go back to; default: the one before")
    for parser in (promote, rollback):
        parser.add_argument("--alias", default="production", help="default: production")
        parser.add_argument("--reason", help="why, for the audit log")
    for parser, run in ((prompts, print_prompts), (promote, move_forward), (rollback, move_back)):
        parser.add_argument("--tracking-uri", help="the MLflow store; default: MLflow's own ($MLFLOW_TRACKING_URI)")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(run=run)


def print_prompts(arguments: argparse.Namespace) -> int:
    """Print programs, versions or moves."""
    uri, name = arguments.tracking_uri, arguments.name
    if arguments.history:
        if name is None:
            raise ConfigError("--history needs the name of a program")
        return _moves(arguments, registry.history(name, tracking_uri=uri))
    if name is not None:
        return _versions(arguments, registry.versions(name, tracking_uri=uri))
    newest = [registry.versions(each, tracking_uri=uri)[0] for each in registry.programs(tracking_uri=uri)]
    return _versions(arguments, Versions(newest, "Published programs, newest versions"))


def move_forward(arguments: argparse.Namespace) -> int:
    """Move an alias forward."""
    entry = registry.promote(
        arguments.name, arguments.version, alias=arguments.alias, expected=arguments.expected,
        reason=arguments.reason, tracking_uri=arguments.tracking_uri,
    )  # fmt: skip
    return _moved(arguments, entry)


def move_back(arguments: argparse.Namespace) -> int:
    """Move an alias back."""
    entry = registry.rollback(
        arguments.name, alias=arguments.alias, to=arguments.to, reason=arguments.reason,
        tracking_uri=arguments.tracking_uri,
    )  # fmt: skip
    return _moved(arguments, entry)


def _versions(arguments: argparse.Namespace, found: Versions) -> int:
    if arguments.json:
        return print_json([version.to_dict() for version in found])
    return show(found if found else "Nothing is published in this MLflow store.")


def _moves(arguments: argparse.Namespace, found: History) -> int:
    if arguments.json:
        return print_json([entry.to_dict() for entry in found])
    return show(found if found else f"No alias of {arguments.name} was moved yet.")


def _moved(arguments: argparse.Namespace, entry: AuditEntry) -> int:
    if arguments.json:
        return print_json(entry.to_dict())
    return show(f"{arguments.name}: {entry}")
