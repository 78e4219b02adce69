"""Error reporters show the `repr` of every local of every frame: none of ours shows a key."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dspy_prod

KEY, HEADER = "a-key-that-looks-like-nothing", "a-header-that-looks-like-nothing"
OURS = str(Path(dspy_prod.__file__).parent)
MODELS = {"native": {"engine": "lm15"}, "litellm": {"engine": "litellm"}}


def frames(error: BaseException | None) -> Iterator[tuple[str, Any]]:
    """Our frames of an error, its causes and what they came from."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename.startswith(OURS):
                yield f"{Path(frame.f_code.co_filename).relative_to(OURS)}:{frame.f_code.co_name}", frame
        error = error.__cause__ or error.__context__


def shown(error: BaseException) -> list[str]:
    """Where a reporter would show the key or the header."""
    return [
        f"{place} {name}"
        for place, frame in frames(error)
        for name, value in frame.f_locals.items()
        if any(secret in repr(value) for secret in (KEY, HEADER))
    ]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("given", ["lm", "call"])
@pytest.mark.parametrize("engine", MODELS)
def test_no_local_of_ours_shows_a_key(engine: str, given: str, asynchronous: bool) -> None:
    """A reporter printed the key with each error: it stood in mappings that travel through our frames."""
    own = {"api_key": KEY, "extra_headers": {"x-api-key": HEADER}}
    lm = dspy_prod.LM(
        "openai/gpt-4o-mini", api_base="http://127.0.0.1:9/v1", store="memory://", cache=False, num_retries=0,
        **MODELS[engine], **(own if given == "lm" else {"api_key": "other"}),
    )  # fmt: skip
    more = own if given == "call" else {}
    with pytest.raises(Exception) as caught:
        asyncio.run(lm.acall("q", **more)) if asynchronous else lm("q", **more)
    assert list(frames(caught.value))
    assert shown(caught.value) == []
