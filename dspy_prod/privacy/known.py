"""The secrets that this process holds, by their value: those in its environment and in the settings of its LMs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from dspy_prod.privacy.names import SHORTEST, secrets_in
from dspy_prod.runtime.living import living

HIDDEN: Final = "***"
"""Stands for a secret in the text of an error."""


def in_environment() -> frozenset[str]:
    """The secrets in environment variables."""
    while True:
        try:
            return _secrets_of(frozenset(os.environ.items()))
        except KeyError:  # another thread has just deleted one
            continue


@lru_cache(maxsize=1)  # each error asks, and hardly ever has one of them changed
def _secrets_of(variables: frozenset[tuple[str, str]]) -> frozenset[str]:
    keys = {value for name, value in variables if name.upper().endswith("_KEY") and len(value) >= SHORTEST}
    return frozenset(secrets_in(dict(variables)) | keys)


def known() -> set[str]:
    """Every secret in the environment and in the settings of the LMs alive."""
    found = set(in_environment())
    for lm in living():
        found |= secrets_in(lm.settings.clients) | secrets_in(lm.settings.extras)
    return found


def blotted(text: str, secrets: Iterable[str]) -> str:
    """The text with `***` in place of each secret; the longest first, for it may contain another."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text
