"""The program that `dspy-prod demo` runs: triage of support messages, with labelled messages to run it on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal, get_args

import dspy
from pydantic import Field

Category = Literal["billing", "technical", "account", "shipping"]
Urgency = Literal["low", "normal", "high"]
CATEGORIES: tuple[str, ...] = get_args(Category)
URGENCIES: tuple[str, ...] = get_args(Urgency)
