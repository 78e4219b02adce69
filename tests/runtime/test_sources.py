"""Sources are read one at a time."""

from __future__ import annotations

import ast
import threading
from typing import Any

import pytest

from dspy_prod.runtime import sources


def test_threads_that_read_at_once_all_get_it() -> None:
    """Python's own parser fails in some of them: SystemError, in one of a few hundred."""
    found: list[object] = []

    def read() -> None:
        try:
            for _ in range(6):
                found.append(sources.source(threading.Thread))
                found.append(type(sources.tree(threading.Thread)).__name__)
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {each if isinstance(each, str) else repr(each) for each in found} == {
        sources.source(threading.Thread), "Module",
    }  # fmt: skip
    assert len(found) == 4 * 6 * 2


def test_what_fails_since_others_parse_at_that_moment_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    inherited, failing = ast.parse, [True, True]

    def parse(*args: Any, **kwargs: Any) -> Any:
        if failing:
            failing.pop()
            raise SystemError("AST constructor recursion depth mismatch (before=90, after=65)")
        return inherited(*args, **kwargs)

    monkeypatch.setattr(ast, "parse", parse)
    assert type(sources.tree(threading.Thread)).__name__ == "Module"
    assert not failing


def test_one_that_always_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*args: Any, **kwargs: Any) -> Any:
        raise SystemError("another one")

    monkeypatch.setattr(ast, "parse", parse)
    with pytest.raises(SystemError, match="another one"):
        sources.tree(threading.Thread)
