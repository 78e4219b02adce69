"""Names: of programs, of the MLflow prompts behind them, and references to a version.

MLflow allows letters, digits, `-`, `_` and `.` in the name of a prompt; DSPy names predictors `steps[0].draft` or
`experts['tax']`. A character that MLflow does not allow becomes `-` + its code point in hexadecimal + `-`, and so does
`-` itself. Two predictors therefore never share a prompt, and the name can be read back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from dspy_prod.errors import ConfigError

LONGEST: Final = 250
"""Characters of a prompt's name; MLflow's databases hold 256."""

JOURNAL: Final = "audit-log"
"""Suffix of the prompt that holds a program's promotions; no predictor is encoded to it, for `l` is no hex digit."""

_PROGRAM: Final = re.compile(r"[A-Za-z0-9_.-]+")
_KEPT: Final = re.compile(r"[^A-Za-z0-9_.]")
_REFERENCE: Final = re.compile(r"(?:prompts:/+)?(?P<name>[^@/]+)(?:@(?P<alias>[^@/]+)|/(?P<version>\d+))")


def checked_name(name: str) -> str:
    """The name of a program, if MLflow takes it; else a ConfigError that proposes one that fits."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"a program's name is a non-empty string, got {name!r}")
    if _PROGRAM.fullmatch(name) is None:
        fitting = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-") or "program"
        raise ConfigError(
            f"the name {name!r} has characters that MLflow does not allow; use letters, digits, '-', '_' and '.', "
            f"for example {fitting!r}"
        )
    if len(name) > LONGEST // 2:
        raise ConfigError(f"the name {name[:40]!r}... has {len(name)} characters; use at most {LONGEST // 2}")
    return name


def encoded(predictor: str) -> str:
    """A predictor's name in MLflow's alphabet."""
    return _KEPT.sub(lambda match: f"-{ord(match[0]):x}-", predictor)


def predictor_prompt(program: str, predictor: str) -> str:
    """The MLflow prompt of one predictor of a program; a ConfigError when its name is too long for MLflow."""
    name = f"{program}.{encoded(predictor)}"
    if len(name) > LONGEST:
        raise ConfigError(
            f"the predictor {predictor[:60]!r} needs a prompt name of {len(name)} characters, MLflow holds {LONGEST}; "
            "shorten the program's name, the attribute or the dict key"
        )
    return name


def journal_prompt(program: str) -> str:
    """The MLflow prompt that holds the promotions of a program."""
    return f"{program}.{JOURNAL}"


@dataclass(frozen=True)
class Reference:
    """A version of a program: by number, or by the alias that points to it."""

    name: str
    version: int | None = None
    alias: str | None = None

    @classmethod
    def of(cls, text: str) -> Reference:
        """Read `triage/3`, `triage@production`, `prompts:/triage/3` or `prompts:/triage@production`.

        Raises:
            ConfigError: it is none of these.
        """
        match = _REFERENCE.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ConfigError(
                f"{text!r} names no version of a program; write 'name@production' (an alias) or 'name/3' (a version)"
            )
        version = match["version"]
        return cls(checked_name(match["name"]), None if version is None else int(version), match["alias"])

    def __str__(self) -> str:
        return f"{self.name}/{self.version}" if self.alias is None else f"{self.name}@{self.alias}"
