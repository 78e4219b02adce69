"""Reads what people say of traces in MLflow: assessments that were left on its pages, or by `mlflow.log_feedback`.

In the exporter process. Asked with `{"names": [...], "tags": {tag: value}, "since": ms, "page": [search, token]}`: of
traces with any one of the tags (`%`: whatever value it has), not older than that. It answers with what was found within
`PATIENCE`, and with the page to go on with.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

OURS: Final = "dspy_prod.feedback"
"""Metadata of the feedback that this library has written: by it, it is found again, and not taken for a person's."""
PATIENCE: Final = 2.0
"""Seconds after which reading is broken off: traces wait to be written meanwhile."""
_PAGE: Final = 100
_WHOSE: Final = (("user", "mlflow.trace.user"), ("session", "mlflow.trace.session"))


def assessments(client: Any, experiment: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was found: `{"found": [...], "page": where to go on, None at the end}`.

    Each is `{"id", "trace", "name", "value", "at", "user", "session", "tenant"}`; `at`: seconds since the epoch at
    which it was said; a correction has the `id` of what it corrects.

    Args:
        client: MLflow's. experiment: where traces are. asked: see the module's docstring.
    """
    until = time.monotonic() + PATIENCE
    searches = list(itertools.product(asked["names"], sorted(asked["tags"].items())))
    place, token = asked.get("page") or (0, None)
    found: dict[str, dict[str, Any]] = {}
    while place < len(searches):
        name, (tag, value) = searches[place]
        compared = "LIKE" if value == "%" else "="
        page = client.search_traces(
            locations=[experiment], max_results=_PAGE, page_token=token, include_spans=False,
            order_by=["timestamp_ms DESC"],
            filter_string=f"feedback.{_quoted(name)} IS NOT NULL AND timestamp_ms >= {int(asked['since'])} "
            f"AND tag.{_quoted(tag)} {compared} '{_text(value)}'",
        )  # fmt: skip
        for trace in page:
            found.update((one["id"], one) for one in _told(trace.info, asked["names"]))
        token = page.token or None
        place += token is None
        if time.monotonic() > until and place < len(searches):
            return {"found": list(found.values()), "page": [place, token]}
    return {"found": list(found.values()), "page": None}


def _told(info: Any, names: list[str]) -> Iterator[dict[str, Any]]:
    """What is said of a trace, in force now."""
    over = {one.assessment_id: one.overrides for one in info.assessments if getattr(one, "overrides", None)}
    metadata, tags = info.trace_metadata or {}, info.tags or {}
    whose = {name: metadata.get(key) for name, key in _WHOSE}
    for one in info.assessments:
        feedback = getattr(one, "feedback", None)
        if one.name not in names or feedback is None or getattr(one, "valid", None) is False:
            continue
        if OURS in (one.metadata or {}) or getattr(feedback, "error", None):
            continue
        first = one.assessment_id
        while first in over:
            first = over.pop(first)
        value = feedback.value
        yield {
            "id": first, "trace": info.trace_id, "name": one.name,
            "value": value if isinstance(value, (bool, int, float)) else str(value)[:50],
            "at": (one.last_update_time_ms or one.create_time_ms) / 1000, **whose,
            "tenant": tags.get("dspy_prod.tenant"),
        }  # fmt: skip


def _quoted(name: str) -> str:
    return f"`{name.replace('`', '')}`"


def _text(value: str) -> str:
    return value.replace("'", "")
