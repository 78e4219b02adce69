"""Reading: health, costs, the ledger, previews."""

from __future__ import annotations
