"""Secrets that stay behind in this process when something is pickled: the pickle carries a mark in their place.

A mark says nothing outside the process that made it: another process takes keys from its environment.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dspy_prod.privacy.names import public
from dspy_prod.runtime.recent import Recent

_MARK: Final = "_secrets"
_PROCESS_KEY: Final = secrets.token_bytes(16)

MAX_SECRETS: Final = 1024
"""Sets of secrets kept for pickles whose LM is gone; a living LM is found again with its own."""

_VAULT: Final[Recent[dict[str, Any]]] = Recent(MAX_SECRETS)


def seal(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments without their secrets, and a mark for `unseal`."""
    kept = public(arguments)
    hidden = {name: value for name, value in arguments.items() if name not in kept or not _same(kept[name], value)}
    if hidden:
        text = repr(sorted(hidden.items(), key=lambda item: item[0])).encode("utf-8", "replace")
        mark = hmac.new(_PROCESS_KEY, text, hashlib.sha256).hexdigest()
        _VAULT.keep(mark, hidden)
        kept[_MARK] = mark
    return kept


def unseal(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as they were, as far as this process remembers."""
    kept = {name: value for name, value in arguments.items() if name != _MARK}
    kept.update(_VAULT.find(arguments.get(_MARK, "")) or {})
    return kept


@dataclass(frozen=True)
class SealedLM:
    """A plain `dspy.LM` fit to be written; DSPy itself would write its key."""

    bare: Any

    @classmethod
    def of(cls, lm: Any) -> SealedLM:
        """Seal a copy."""
        bare = lm.copy()
        bare.kwargs = seal(lm.kwargs)
        return cls(bare)

    def opened(self) -> Any:
        """The LM again."""
        lm = self.bare.copy()
        lm.kwargs = unseal(self.bare.kwargs)
        return lm


def _same(kept: Any, value: Any) -> bool:
    return kept is value or (isinstance(value, str) and kept == value)
