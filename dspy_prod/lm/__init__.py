"""`dspy_prod.LM` and `wrap`: the public call, down to where the pipeline takes over.

Here is what the constructor's arguments are and how they are copied, pickled, saved and read from a file (`settings`,
`copying`, `state`, `config`), how they become a pipeline (`assembling`), and the drop-in behaviour of a call
(`calling`). What happens to a request after that belongs in `pipeline`. Only `cli` stands above.
"""

from __future__ import annotations

import sys

from dspy_prod.lm import sealing, settings
from dspy_prod.lm.closing import close_all
from dspy_prod.lm.lm import LM
from dspy_prod.lm.wrapping import wrap
from dspy_prod.runtime import clock

__all__ = ["LM", "close_all", "wrap"]

# Pickled LMs of 0.1.0 name what they hold by the modules of then.
for _module in (settings, sealing, clock):
    sys.modules.setdefault(f"dspy_prod.{_module.__name__.rpartition('.')[2]}", _module)
