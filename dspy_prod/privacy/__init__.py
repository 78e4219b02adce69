"""Secrets and personal data, kept out of everything that is written: errors, logs, traces, ledger, files.

What is looked for and what stands in its place belongs here: `rules` and what finds their places in a text, `names`
and `secrets` for keys, `known` and `forms` for those of this process, `unshown` for their way through our frames,
`error_text` for what may be shown of an error, `visible` for what would steer a screen. Every room above asks here
before it writes: `outward` is the door of every text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspy_prod.runtime.doors import door

if TYPE_CHECKING:
    from dspy_prod.privacy.redactor import DEFAULT, FAILED, KEY_VARIABLE, Redactor, active, default, install, known_as

__all__ = ["DEFAULT", "FAILED", "KEY_VARIABLE", "Redactor", "active", "default", "install", "known_as"]

# The exporter of traces is a process that needs the names and not all of DSPy.
__getattr__, __dir__ = door(__name__, {"redactor": " ".join(__all__)})
