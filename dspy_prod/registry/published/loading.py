"""`load`: a published version is put into a program, from MLflow or, when that is down, from the last good copy."""

from __future__ import annotations

import datetime as dt
import logging
import os
import time
from pathlib import Path
from typing import Any, Final, TypeVar

import dspy

from dspy_prod.context.current import mark
from dspy_prod.errors import ConfigError
from dspy_prod.privacy.unshown import unshown
from dspy_prod.registry.errors import RegistryError, RegistryUnavailableError, UnknownVersionError
from dspy_prod.registry.names import Reference
from dspy_prod.registry.published import copies
from dspy_prod.registry.published.copies import MEMORY, Copy, Release
from dspy_prod.registry.published.manifest import manifest_in, state_in
from dspy_prod.registry.published.signatures import check_fields, fields_of
from dspy_prod.registry.published.states import check_keys, own_lm, prepared, restored_lm
from dspy_prod.registry.server import Server, server_at
from dspy_prod.telemetry.events import BUS

MAX_AGE: Final = 60.0
"""Seconds for which a copy in memory is used without asking MLflow again."""

AGAIN_AFTER: Final = 10.0
"""Seconds for which a server that was down is not asked again."""

_log = logging.getLogger("dspy_prod")
_failed_at: dict[str, float] = {}
P = TypeVar("P", bound=dspy.Module)


def load(
    reference: str,
    program: P,
    *,
    max_age: float | dt.timedelta = MAX_AGE,
    cache_dir: str | os.PathLike[str] | None = None,
    allow_unsafe_lm_state: bool = False,
    tracking_uri: str | None = None,
) -> P:
    """Put a published version into a program, which then sends the prompts that were published, byte for byte.

    The program is changed only once everything is read and fits. An LM that a predictor of the program has is kept.

    When MLflow does not answer within seconds, the last good copy is used, from memory or from disk, and the event
    `registry_stale` tells so, with the copy's age.

    Args:
        reference: `"triage@production"`, `"triage/3"`, or a `prompts:/` URI of either.
        program: the program from the code, with the predictors and fields that were published.
        max_age: seconds for which a copy in memory is used without asking again; 0 always asks. An alias that this
            process has moved meanwhile is asked for again all the same.
        cache_dir: where copies are kept on disk; default: `.dspy_prod/registry` in the working directory.
        allow_unsafe_lm_state: as in `dspy.Module.load`: rebuild LMs that were published with a class or an address of
            their own, and take whatever arguments a predictor calls with. Plain `dspy.LM`s are always rebuilt, without
            their key, from what cannot lead their calls elsewhere.
        tracking_uri: the MLflow store; default: MLflow's current one.

    Returns:
        The program.

    Raises:
        SignatureMismatchError: predictors or fields are not those that were published.
        UnknownVersionError: there is no such version or alias.
        RegistryUnavailableError: MLflow does not answer and there is no copy.
        RegistryError: the version is no program, or somebody changed it in MLflow.
        ConfigError: the reference cannot be read, or `program` is no `dspy.Module`.

    Example:
        ```python
        live = registry.load("triage@production", program)
        ```
    """
    tracking_uri = unshown(tracking_uri)
    if not isinstance(program, dspy.Module):
        raise ConfigError(f"load takes the program to fill, a dspy.Module, got {type(program).__name__}")
    seconds = max_age.total_seconds() if isinstance(max_age, dt.timedelta) else float(max_age)
    if not seconds >= 0:
        raise ConfigError(f"max_age={seconds!r} is a number of seconds, 0 or more")
    directory = None if cache_dir is None else Path(cache_dir)
    release = obtain(server_at(tracking_uri), Reference.of(reference), seconds, directory)
    put_into(program, release, allow_unsafe_lm_state=allow_unsafe_lm_state)
    return program


def obtain(server: Server, reference: Reference, max_age: float, directory: Path | None = None) -> Release:
    """A reference's version: from memory if fresh, else from MLflow, else from the last good copy; raises as `load`."""
    key = (server.uri, str(reference))
    copy = MEMORY.find(key)
    now = time.time()
    if copy is not None and (reference.version is not None or _is_fresh(copy, key, now, max_age)):
        return copy.release
    try:
        if copy is not None and 0 <= now - _failed_at.get(server.uri, 0.0) < min(AGAIN_AFTER, max_age):
            raise RegistryUnavailableError(f"MLflow at {server.place} did not answer a moment ago")
        return renewed(server, reference, directory)
    except RegistryUnavailableError as error:
        _failed_at[server.uri] = now
        copy = copy or copies.saved(key, directory)
        if copy is None:
            raise RegistryUnavailableError(
                f"{error}; and {copies.file_of(key, directory)} holds no copy of {reference} from an earlier load"
            ) from error
        MEMORY.keep(key, copy, anew=True)
        age = max(0.0, now - copy.confirmed_at)
        _log.warning("%s is served from a copy %.0f s old: %s", reference, age, error)
        BUS.emit("registry_stale", now, reference=str(reference), version=str(copy.release), age=age, error=str(error))
        return copy.release


def _is_fresh(copy: Copy, key: tuple[str, str], now: float, max_age: float) -> bool:
    return 0 <= now - copy.confirmed_at < max_age and copy.after is copies.MOVES.get(key[1])


def exact(server: Server, reference: Reference) -> Release:
    """As `fetch`: a version does not change, and an alias is never answered from an old copy."""
    return obtain(server, reference, 0.0) if reference.alias is None else renewed(server, reference)


def renewed(server: Server, reference: Reference, directory: Path | None = None) -> Release:
    """As `fetch`; a copy is kept in memory and on disk."""
    key = (server.uri, str(reference))
    copy, after = MEMORY.find(key), copies.MOVES.get(key[1])
    release = fetch(server, reference, None if copy is None else copy.release)
    _failed_at.pop(server.uri, None)
    fresh = Copy(release, time.time(), after)
    if copy is None or copy.release is not release or copies.is_old(key, directory):
        copies.save(key, fresh, directory)
    MEMORY.keep(key, fresh, anew=True)
    return release


def fetch(server: Server, reference: Reference, known: Release | None = None) -> Release:
    """The version a reference means, from MLflow; `known` itself, if it is still that one.

    Raises:
        UnknownVersionError, RegistryUnavailableError: as `load`.
        RegistryError: the version is no program, or was tampered with.
    """
    prompt = server.prompt(reference)
    manifest = manifest_in(prompt, reference)
    if known is not None and (known.version, known.manifest) == (int(prompt.version), manifest):
        return known
    states = {}
    for entry in manifest.predictors:
        holder, where = prompt, Reference(reference.name, prompt.version)
        if entry.prompt is not None:
            where = Reference(entry.prompt, entry.version)
            try:
                holder = server.prompt(where)
            except UnknownVersionError as error:
                raise RegistryError(
                    f"{prompt.name}/{prompt.version} is not whole any more, for {where} is missing; publish it again"
                ) from error
        states[entry.name] = state_in(holder.tags, entry.sha256, str(where))
    return Release(reference.name, int(prompt.version), manifest, states)


def put_into(program: Any, release: Release, *, allow_unsafe_lm_state: bool = False) -> None:
    """Make a program the published one, once everything fits: else a SignatureMismatchError, and it is as it was."""
    predictors = dict(program.named_predictors())
    check_fields(
        str(release),
        {entry.name: entry.fields for entry in release.manifest.predictors},
        {name: fields_of(predictor.signature) for name, predictor in predictors.items()},
    )
    changes = []
    for name, predictor in predictors.items():
        try:
            text = release.states[name]
            whose = f"predictor {name!r} of {release}"
            check_keys(whose, predictor, text, allow_unsafe_lm_state)
            changed = prepared(predictor, text, allow_unsafe_lm_state, whose)
            if predictor.lm is None:
                lm = restored_lm(name, own_lm(text), allow_unsafe_lm_state)
                if lm is not None:
                    changed["lm"] = lm
        except (RegistryError, ConfigError):
            raise
        except Exception as error:  # a state that somebody wrote by hand fails in whatever way
            raise RegistryError(
                f"the state of predictor {name!r} of {release} cannot be read; publish the program again "
                f"({type(error).__name__}: {error})"
            ) from error
        changes.append((predictor, changed))
    for predictor, changed in changes:
        predictor.__dict__.update(changed)
    mark(program, str(release))
