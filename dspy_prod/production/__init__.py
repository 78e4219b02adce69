"""`Production`: a program that keeps answering."""

from __future__ import annotations
