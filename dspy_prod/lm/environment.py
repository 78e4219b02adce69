"""Environment variables over a configuration: `DSPY_PROD__LIMIT__RPM=500` is `rpm = 500` in the table `[limit]`."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from dspy_prod.errors import ConfigError
from dspy_prod.privacy.unshown import unshown

PREFIX: Final = "DSPY_PROD__"

NAMED: Final = ("lm", "embedder")
"""Tables of tables, each of which has a name."""


class Sources:
    """Where each key came from, for messages."""

    def __init__(self, path: str, lines: Mapping[tuple[str, ...], int | None] | None = None) -> None:
        self._path = path
        self._lines = lines or {}
        self.variables: dict[tuple[str, ...], str] = {}

    def within(self, *table: str) -> Sources:
        """The places of a table's keys, and of those around it that hold within it."""
        path, lines = self._path, self._lines
        inner = Sources(
            path, {**lines, **{place[len(table) :]: line for place, line in lines.items() if _in(place, table)}}
        )
        own = {place[len(table) :]: name for place, name in self.variables.items() if _in(place, table)}
        inner.variables = {**self.variables, **own}
        return inner

    def of(self, *keys: str) -> str:
        """The place of a key: an environment variable, else the file and the line."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.variables:
                return f"${self.variables[keys[:length]]}"
        for length in range(len(keys), 0, -1):
            if keys[:length] in self._lines:
                line = self._lines[keys[:length]]
                return self._path if line is None else f"{self._path}:{line}"
        within = [name for place, name in self.variables.items() if place[: len(keys)] == keys]
        return f"${within[0]}" if within else self._path or "the environment"


def _in(place: tuple[str, ...], table: tuple[str, ...]) -> bool:
    return len(place) > len(table) and place[: len(table)] == table


_HEADER: Final = re.compile(r"\s*\[\[?([^\[\]]+)\]\]?\s*(?:#.*)?$")
_KEY: Final = re.compile(r"\s*(?:\"([^\"]+)\"|'([^']+)'|([\w-]+))\s*=")
_PART: Final = re.compile(r"\"([^\"]+)\"|'([^']+)'|([\w-]+)")


def lines_of(text: str) -> dict[tuple[str, ...], int | None]:
    """Where the keys of a valid TOML text stand; None for a key that stands in several places."""
    found: dict[tuple[str, ...], int | None] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        header, key = _HEADER.match(line), _KEY.match(line)
        if header is not None:
            table = place = tuple([next(filter(None, part)) for part in _PART.findall(header[1])])
        elif key is not None:
            place = (*table, next(filter(None, key.groups())))
        else:
            continue
        found[place] = None if place in found else number
    return found


def override(values: dict[str, Any], env: Mapping[str, str], sources: Sources, *, texts: Collection[str]) -> None:
    """Put the variables in their places, whole arguments before single options; empty ones count as not set.

    Args:
        values: the configuration to change.
        env: the environment.
        sources: learns which key came from which variable.
        texts: keys whose values are text even where they read as JSON, such as an API key of digits.
    """
    for name, text in sorted(env.items(), key=lambda item: (item[0].count("__"), item[0])):
        if name.upper().startswith(PREFIX) and text != "":
            _override(values, name, text, sources, texts)


def _override(values: dict[str, Any], name: str, text: str, sources: Sources, texts: Collection[str]) -> None:
    """Put one environment variable in its place."""
    keys = name[len(PREFIX) :].lower().split("__")
    if not all(keys):
        raise ConfigError(f"${name}: write {PREFIX}KEY or {PREFIX}TABLE__KEY")
    value: Any = unshown(str(text), keys[-1])
    if keys[-1] not in texts:
        try:
            value = unshown(json.loads(text), keys[-1])
        except (ValueError, RecursionError):
            pass
    sources.variables[tuple(keys)] = name
    place = values
    if keys[0] in NAMED and len(keys) > 2:  # one LM of several: what follows is as for the only one
        tables = values.get(keys[0])
        if not isinstance(tables, dict):
            tables = values[keys[0]] = {}
        if not isinstance(tables.get(keys[1]), dict):
            tables[keys[1]] = {}
        place, keys = tables[keys[1]], keys[2:]
    if keys[0] == "budget" and len(keys) > 1:
        place, keys = _budget(place, keys, name)
    for key in keys[:-1]:
        inner = place.get(key)
        if not isinstance(inner, dict):
            inner = place[key] = {}
        place = inner
    place[keys[-1]] = value


def _budget(values: dict[str, Any], keys: list[str], name: str) -> tuple[dict[str, Any], list[str]]:
    """The table and the keys within it for `budget__usd` (the only budget) or `budget__0__usd` (one of several)."""
    found = values.get("budget")
    budgets = found if isinstance(found, list) and found else [found if isinstance(found, dict) else {}]
    number, rest = (int(keys[1]), keys[2:]) if keys[1].isdigit() else (0, keys[1:])
    if len(budgets) > 1 and not keys[1].isdigit():
        raise ConfigError(f"${name}: there are {len(budgets)} budgets; say which: {PREFIX}BUDGET__0__{keys[1].upper()}")
    if number >= len(budgets) or not rest:
        last = len(budgets) - 1
        raise ConfigError(f"${name}: write {PREFIX}BUDGET__0__USD; the number of a budget goes from 0 to {last}")
    if not isinstance(budgets[number], dict):
        budgets[number] = {}
    values["budget"] = budgets
    return budgets[number], rest
