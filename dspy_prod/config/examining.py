"""`dspy-prod check`: would what a file describes work? Nothing of it begins, and nothing is spent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dspy

from dspy_prod.config.reading import DEFAULT, Told, told_by
from dspy_prod.config.tables import placed
from dspy_prod.errors import ConfigError
from dspy_prod.lm.checking import Finding, check
from dspy_prod.lm.embedder import Embedder
from dspy_prod.lm.lm import LM
from dspy_prod.policies.sharing import quoted
from dspy_prod.production.module import Production


def examined(path: str | Path | None) -> list[Finding]:
    """What would become of each LM, embedder and table of a file.

    Raises:
        ConfigError: the file cannot be read, or an LM or embedder of it cannot be built.
        StoreUnavailableError: a store cannot be used.
    """
    told = told_by(path)
    alone = set(told.lms) == {DEFAULT} and not told.embedders
    found: list[Finding] = []
    with quoted():  # looking at a file must not change what a budget allows
        lms = {"" if alone else f"lm.{name}": LM(**given) for name, given in told.lms.items()}
        embedders = {f"embedder.{name}": Embedder(**given) for name, given in told.embedders.items()}
    try:
        for name, lm in lms.items():
            found += check(lm, name)
        for name, embedder in embedders.items():
            found += check(embedder, name)
    finally:
        for lm in lms.values():
            lm.close()
        for embedder in embedders.values():
            embedder.close()
    return [*dict.fromkeys(found), *_tables(told)]  # one store serves several


def _tables(told: Told) -> list[Finding]:
    found = []
    for name, given, try_out in (
        ("production", told.production or None, _try_production),
        ("tracking", told.tracking, _try_tracking),
        ("logging", told.logging, _try_logging),
        ("metrics", told.metrics, _try_metrics),
        ("alerts", told.alerts, _try_alerts),
    ):
        if given is not None:
            found.append(_table(name, given, try_out, told))
    return found


def _table(name: str, given: Mapping[str, Any], try_out: Callable[..., object], told: Told) -> Finding:
    try:
        try_out(**given)
    except ConfigError as error:
        detail = str(placed(error, name, given, told.sources))
        return Finding(route=f"[{name}]", what="table", outcome="fails", detail=detail)
    return Finding(route=f"[{name}]", what="table", outcome="ok", detail="can be used; nothing of it has begun")


def _try_production(fallback_response: Any = None, follow: Any = None, refresh: Any = None, **given: Any) -> None:
    Production(dspy.Module(), **given)  # what a fallback may say depends on the program


def _try_tracking(**given: Any) -> None:
    from dspy_prod.tracking.setup import check

    check(**given)


def _try_logging(**given: Any) -> None:
    from dspy_prod.telemetry.logs import checked

    checked(**given)


def _try_metrics(**given: Any) -> None:
    from dspy_prod.metrics.serving import check_endpoint

    check_endpoint(**given)


def _try_alerts(**given: Any) -> None:
    from dspy_prod.alerts.setup import checked

    checked(**given)
