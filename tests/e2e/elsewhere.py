"""A provider in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any


class Elsewhere:
    """A provider in a process of its own, so that this one's threads do not delay what it measures."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "dspy_prod.testing", *options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()

    def told(self, page: str) -> Any:
        """`calls` or `bill`, as the provider has them."""
        with urllib.request.urlopen(f"{self.url.removesuffix('/v1')}/_{page}", timeout=10) as answer:
            return json.load(answer)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)
