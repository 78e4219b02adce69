"""What must never leave: the key of every LM that is fuzzed, and the value of a header of theirs."""

from __future__ import annotations

from typing import Final

SECRET: Final = "sk-fuzz-7c1e9bd04a52f3868d17"
HEADER: Final = "hdr-fuzz-e1b74402c9a3d6f5"
