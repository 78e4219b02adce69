"""`python -m dspy_prod.testing`: a provider in a process of its own."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Sequence

from dspy_prod.testing.provider import Provider


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a provider until interrupted. Prints its URL as the first line; GET /_bill and /_calls show what it saw."""
    parser = argparse.ArgumentParser(prog="python -m dspy_prod.testing", description=main.__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--latency", type=_latency, default=0.0, help="seconds before an answer, or a range: 0.05-0.3")
    parser.add_argument("--answer", default=None, help="text of every answer")
    parser.add_argument("--rpm", type=int, default=None, help="requests in any 60 s")
    parser.add_argument("--tpm", type=int, default=None, help="tokens in any 60 s")
    parser.add_argument("--per-second", type=int, default=None, help="requests in any 1 s")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after this long")
    given = vars(parser.parse_args(arguments))
    seconds = given.pop("seconds")
    provider = Provider(**given)
    try:
        provider.start()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        parser.error(f"argument --port: {given['port']} cannot be listened on ({reason}); 0 takes a free one")
    try:
        print(provider.url, flush=True)
        threading.Event().wait(seconds)
    except KeyboardInterrupt:
        pass
    finally:
        provider.stop()


def _latency(text: str) -> float | tuple[float, float]:
    low, dash, high = text.partition("-")
    return (float(low), float(high)) if dash else float(low)


if __name__ == "__main__":
    main()
