"""The private names of DSPy, its lm15, LiteLLM and MLflow that this library cannot do without, and nothing else.

One function or name for each need, and no rule of ours. All are bound at import, so that a call pays nothing for them.
`tests/compat` holds what is believed of them.
"""

from __future__ import annotations
