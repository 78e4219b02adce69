"""One LM call on its way: the flow, what an attempt reserves, and settling what really happened.

Here the policies are put together, and nowhere else: their order is `flow.py`, what an end means for each of them is
`outcome.py`, how a refusal reads is `refusals.py`. The flow yields effects; only `drivers.py` waits and sends. A rule
of one policy belongs in `policies`, how a model is reached in `upstream`. Imported by `lm`, `status` and `cli`.
"""
