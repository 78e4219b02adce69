"""Sources are read one at a time."""

from __future__ import annotations

import threading

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
