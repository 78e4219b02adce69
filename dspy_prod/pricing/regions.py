"""Where a route's calls are served, for the providers that charge more in some regions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

_HOSTS: Final = {"eu.api.openai.com": "eu", "us.api.openai.com": "us"}
_PLACES: Final = ("VERTEXAI_LOCATION", "VERTEX_LOCATION", "GOOGLE_CLOUD_LOCATION")


def region_of(clients: Mapping[str, Any], model: str) -> str | None:
    """The region by which `Rates.uplifts` names a price of its own; None where calls cost the plain one.

    OpenAI: the host of the address ("Data residency"). Vertex AI: any location but the global one, also when none is
    stated, since the default is a region.
    """
    if model.partition("/")[0].partition(":")[0].startswith("vertex"):
        stated = clients.get("vertex_location") or clients.get("vertex_ai_location") or clients.get("location")
        place = stated or next((found for name in _PLACES if (found := os.environ.get(name))), None)
        return None if isinstance(place, str) and place.lower() == "global" else "regional"
    address = clients.get("api_base") or clients.get("base_url") or os.environ.get("OPENAI_BASE_URL")
    try:
        host = urlsplit(address).hostname if isinstance(address, str) else None
    except ValueError:
        host = None
    return _HOSTS.get(host or "")
