"""The demo's program as versions in MLflow's prompt registry: a first draft, and the version that runs."""

from __future__ import annotations

from typing import Final

import dspy
from rich.console import Console

from dspy_prod.cli.demo.triage import Triage
from dspy_prod.errors import ConfigError
from dspy_prod.privacy.error_text import error_text

NAME: Final = "triage"
DRAFT: Final = (
    "You are a helpful assistant. Read what the customer wrote and decide which category it belongs to and how urgent "
    "it is. Then write a reply."
)
DRAFT_MESSAGE: Final = "demo: a first draft"
MESSAGE: Final = "demo: one short instruction, which small models follow better"
REASON: Final = "dspy-prod demo"


def published(console: Console, uri: str) -> tuple[Triage, str | None]:
    """The program to run, and the version it is; None, with a line that says why, when it is not published.

    Two versions are published and promoted one after the other, so that the second is `production` and the first
    `previous`. Done again, it changes nothing. A program of that name which is not the demo's is left alone.

    Args:
        console: for the line. uri: MLflow's tracking URI.
    """
    from dspy_prod import registry

    try:
        found = registry.versions(NAME, tracking_uri=uri) if NAME in registry.programs(tracking_uri=uri) else []
        if any(version.message not in (DRAFT_MESSAGE, MESSAGE) for version in found):
            console.print(f"MLflow has a program {NAME!r} that is not the demo's: the demo publishes none.")
            return Triage(), None
        draft, final = Triage(), Triage()
        draft.sort.signature = draft.sort.signature.with_instructions(DRAFT)
        with dspy.context(lm=None, adapter=dspy.JSONAdapter()):  # no LM: the versions are the same with any model
            first = registry.publish(draft, NAME, message=DRAFT_MESSAGE, tracking_uri=uri)
            second = registry.publish(final, NAME, message=MESSAGE, tracking_uri=uri)
        if "production" not in second.aliases:
            for version in (first, second):
                registry.promote(NAME, version, reason=REASON, tracking_uri=uri)
        return registry.load(str(second), Triage(), tracking_uri=uri), str(second)
    except (registry.RegistryError, ConfigError) as error:
        console.print(f"The demo's prompts are not in MLflow: {error_text(error)}", markup=False)
        return Triage(), None
