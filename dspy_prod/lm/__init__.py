"""`dspy_prod.LM` and `wrap`: the public call, down to where the pipeline takes over.

Here is what the constructor's arguments are and how they are copied, pickled, saved and read from a file (`settings`,
`copying`, `state`, `config`), how they become a pipeline (`assembling`), and the drop-in behaviour of a call
(`calling`, `executing`). What happens to a request after that belongs in `pipeline`. Only
`cli` stands above.
"""

from __future__ import annotations

from dspy_prod.lm.lm import LM, wrap

__all__ = ["LM", "wrap"]
