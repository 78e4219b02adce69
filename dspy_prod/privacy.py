from __future__ import annotations

from typing import Any


class Redactor:
    def __init__(self, *a: Any, patterns: Any = (), function: Any = None) -> None: ...
    def text(self, s: str) -> str:
        return s

    def value(self, v: Any) -> Any:
        return v

    def identity(self, s: str) -> str:
        return s


def install(r: Any) -> Any:
    return lambda: None
