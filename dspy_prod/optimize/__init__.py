"""Optimizers under a budget: a run that costs at most what was said, and always returns the best program found."""

from __future__ import annotations
