"""What an experiment compares: versions, programs or LMs, each resolved once and pinned from then on.

An alias is looked up when the experiment is made. Whoever moves it later moves no variant; the controller notices and
says so, since what was measured is then no longer what the alias names.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

import dspy

from dspy_prod.compat.dspy import copy_of
from dspy_prod.context.current import mark_of
from dspy_prod.errors import ConfigError
from dspy_prod.production.module import Production

Kind = Literal["version", "program", "lm"]

_log = logging.getLogger("dspy_prod")

_TAKES: Final = (
    "a version such as 'triage@production' or 'triage/3', a ProgramVersion, a dspy.Module, or an LM such as "
    "dspy_prod.LM('openai/gpt-4o-mini')"
)


@dataclass(frozen=True)
class Variant:
    """One arm of an experiment.

    Attributes:
        name: as in `variants=`. program: what runs.
        kind: what was given: a published version, a program, or an LM under the experiment's program.
        said: what was given, in words. version: as the ledger has it, `"triage/3"`; None of what was not published.
        alias: by which it was named, as `"production"`; None when it was not by one.
    """

    name: str
    program: Production
    kind: Kind
    said: str
    version: str | None = None
    alias: str | None = None

    @cached_property
    def exact(self) -> str:
        """What was given, in words that another program does not have: `"Triage (3f2a9c1d)"`."""
        if self.kind == "version":
            return self.said
        digest = _digest(self.program)
        return self.said if digest is None else f"{self.said} ({digest})"

    @property
    def number(self) -> int | None:
        """Of the version."""
        return None if self.version is None else int(self.version.rpartition("/")[2])


def resolved(
    experiment: str,
    variants: Mapping[str, Any],
    program: dspy.Module | None,
    tracking_uri: str | None = None,
    pinned: Mapping[str, str] | None = None,
) -> tuple[Variant, ...]:
    """Every variant, ready to run, control first.

    Args:
        experiment: its name, for errors. variants: by name; control is the first one, or the one called "control".
        program: the code that versions and LMs are put into; not needed where every variant is a program.
        tracking_uri: of the MLflow store with the versions; default: MLflow's current one.
        pinned: versions that were found when the experiment was made; an alias is not looked up again.

    Raises:
        ConfigError: a variant cannot be meant; the message names it and the remedy.
        SignatureMismatchError, UnknownVersionError, RegistryUnavailableError: as `registry.load`.
    """
    where = f"Experiment({experiment!r})"
    if not isinstance(variants, Mapping) or not all(isinstance(name, str) and name for name in variants):
        raise ConfigError(f"{where}: variants= takes a dict from names to {_TAKES}")
    if not isinstance(program, dspy.Module | None):
        raise ConfigError(f"{where}: program= takes a dspy.Module, got {type(program).__name__}")
    names = list(variants)
    if "control" in variants:
        names.remove("control")
        names.insert(0, "control")
    pinned = pinned or {}
    return tuple([_variant(where, name, variants[name], program, tracking_uri, pinned.get(name)) for name in names])


def _variant(where: str, name: str, given: Any, program: Any, tracking_uri: str | None, pinned: str | None) -> Variant:
    if isinstance(given, dspy.Module):
        version = mark_of(given.program if isinstance(given, Production) else given)
        told = None if version is None else str(version)
        return Variant(name, _guarded(where, name, given), "program", type(given).__name__, told)
    if program is None:
        raise ConfigError(f"{where}: variants[{name!r}]: give program= too, the code that it is put into")
    own = copy_of(program)  # an experiment's variants share routes, limits and budgets
    if isinstance(given, dspy.BaseLM):
        own.set_lm(given)
        return Variant(name, _guarded(where, name, own), "lm", str(getattr(given, "model", type(given).__name__)))
    from dspy_prod.registry.names import Reference
    from dspy_prod.registry.published.loading import load
    from dspy_prod.registry.published.manifest import ProgramVersion

    if not isinstance(given, (str, ProgramVersion)):
        raise ConfigError(f"{where}: variants[{name!r}]: takes {_TAKES}; got {type(given).__name__}")
    try:
        reference = Reference.of(str(given))
    except ConfigError:
        raise ConfigError(f"{where}: variants[{name!r}]={given!r}: takes {_TAKES}") from None
    exact = str(given) if pinned is None else pinned
    load(exact, own.program if isinstance(own, Production) else own, max_age=0, tracking_uri=tracking_uri)
    version = mark_of(own.program if isinstance(own, Production) else own)
    told = None if version is None else str(version)
    return Variant(name, _guarded(where, name, own), "version", str(given), told, reference.alias)


def _guarded(where: str, name: str, program: Any) -> Production:
    """The program of a variant in a `Production`, which reports each call and writes its record."""
    if any(isinstance(each, Production) and each.is_following for _, each in program.named_sub_modules()):
        raise ConfigError(
            f"{where}: variants[{name!r}] follows an alias, but a variant stays what it is while it is "
            "measured: leave out follow=, or name the alias itself in variants="
        )
    return program if isinstance(program, Production) else Production(program)


def _digest(program: Any) -> str | None:
    """What tells the instructions, demonstrations and fields of a program from those of another one; LMs do not count.

    None where they cannot be written down.
    """
    state = {name: part for name, part in program.dump_state().items() if name != "lm"}
    for part in state.values():
        if isinstance(part, dict):
            part.pop("lm", None)
    try:
        text = json.dumps(state, sort_keys=True)
    except (TypeError, ValueError) as error:
        _log.debug("A variant's state cannot be written down: %s", error)
        return None
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
