"""How an answer is written down, for the cache and for the log of a run: as JSON, with what it cost."""

from __future__ import annotations

from typing import Final

import orjson
from dspy.lm15 import Response

from dspy_prod.compat.lm15 import response_from_dict, response_to_dict

_LIST: Final = "dspy_prod_list_nano"
"""Beside the fields of a kept answer, where other releases pass it over: what it cost."""


def dumped(response: Response, list_nano: int | None) -> bytes:
    """An answer and what it cost, as JSON.

    Raises:
        TypeError, ValueError: it cannot be written so.
    """
    fields = response_to_dict(response)
    return orjson.dumps(fields if list_nano is None else {**fields, _LIST: list_nano})


def loaded(value: bytes) -> tuple[Response, int | None]:
    """What `dumped` wrote, without the cost where an earlier release did. Raises whatever damage makes it raise."""
    fields = orjson.loads(value)
    list_nano = fields.get(_LIST)
    return response_from_dict(fields), list_nano if type(list_nano) is int and list_nano >= 0 else None
