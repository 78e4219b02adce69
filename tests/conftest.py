"""What every test shares: no network, and none of the developer's own credentials or endpoints."""

from __future__ import annotations

import os

# At import, before any test module imports dspy or litellm: both read these variables once.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
for _name in [name for name in os.environ if name.upper().endswith(("_API_KEY", "_API_BASE", "_BASE_URL"))]:
    del os.environ[_name]
