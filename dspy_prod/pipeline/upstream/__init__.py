"""One route's way to the model: which engine sends a request, in what time, and how its errors read.

What depends on a provider, a transport, lm15 or LiteLLM belongs here: engines, deadlines of one attempt, rate-limit
headers, usage. It knows nothing of budgets, retries or the flow; `routes.py` and the drivers use it.
"""
