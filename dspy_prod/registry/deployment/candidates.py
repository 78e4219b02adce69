"""What is to be deployed: a published version, or a program that has yet to be published."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import dspy

from dspy_prod.errors import ConfigError
from dspy_prod.registry.aliases.promotion import find_version
from dspy_prod.registry.names import Reference
from dspy_prod.registry.published.loading import exact, put_into
from dspy_prod.registry.published.manifest import ProgramVersion, named
from dspy_prod.registry.published.publishing import published
from dspy_prod.registry.server import Server

Given: TypeAlias = "int | str | os.PathLike[str] | ProgramVersion | dspy.Module"


@dataclass(frozen=True)
class Candidate:
    """What is to be deployed.

    Attributes:
        said: how it was named.
        program: the program from the code, to put versions into.
        version: its version; None while it is not published.
        loaded: the program to publish; None when a version was named.
    """

    said: str
    program: Any
    version: ProgramVersion | None
    loaded: dspy.Module | None = None


def resolve(
    server: Server, name: str, given: Given, program: dspy.Module | Callable[[], dspy.Module] | None
) -> Candidate:
    """Find or load a candidate, and make sure that it fits the program.

    Args:
        server: where the versions are.
        name: the program's name.
        given: a version number, a reference or alias, a `ProgramVersion`, the path of a saved state, or a program.
        program: the program from the code, or what makes it; not needed when a program was given.

    Raises:
        ConfigError: it cannot be read; names the file or argument.
        SignatureMismatchError, UnknownVersionError, RegistryUnavailableError: as `load`.
    """
    if isinstance(given, dspy.Module):
        bare = given if program is None else _made(program)
        return Candidate(type(given).__name__, bare, published(server, given, name), given)
    bare = _made(program)
    path = _path(given)
    if path is not None:
        loaded = _from_file(bare.deepcopy(), path)
        return Candidate(str(path), bare, published(server, loaded, name), loaded)
    assert isinstance(given, (int, str, ProgramVersion))
    version = find_version(server, name, named(name, given))
    put_into(bare.deepcopy(), exact(server, Reference(name, version.version)))
    return Candidate(str(given), bare, version)


def _made(program: Any) -> Any:
    made = program if isinstance(program, dspy.Module) or not callable(program) else program()
    if not isinstance(made, dspy.Module):
        raise ConfigError(
            f"program= takes the program from your code, a dspy.Module or a function that makes one, got "
            f"{'none' if made is None else type(made).__name__}"
        )
    return made


def _path(given: Any) -> Path | None:
    if isinstance(given, os.PathLike) or (isinstance(given, str) and given.endswith((".json", ".pkl"))):
        return Path(given)
    if isinstance(given, bool) or not isinstance(given, (int, str, ProgramVersion)):
        raise ConfigError(
            f"a candidate is a version number, an alias, a program, or the path of a state that program.save(...) "
            f"wrote as .json; got {type(given).__name__}"
        )
    return None


def _from_file(program: Any, path: Path) -> dspy.Module:
    if path.suffix != ".json":
        raise ConfigError(f"{path}: a candidate's file is JSON, as program.save('candidate.json') writes it")
    try:
        program.load(path)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}; give one that program.save({path.name!r}) wrote") from None
    except Exception as error:  # no JSON, other predictors, other fields: whatever DSPy raises
        raise ConfigError(
            f"{path} does not fit {type(program).__name__}: {type(error).__name__}: {error}; give a file that "
            f"program.save({path.name!r}) wrote for a program with the same predictors and fields"
        ) from error
    found: dspy.Module = program
    return found
