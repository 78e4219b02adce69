"""Secrets and personal data, kept out of everything that is written."""

from __future__ import annotations

from dspy_prod.privacy.redactor import DEFAULT, FAILED, KEY_VARIABLE, Redactor, active, default, install, known_as

__all__ = ["DEFAULT", "FAILED", "KEY_VARIABLE", "Redactor", "active", "default", "install", "known_as"]
