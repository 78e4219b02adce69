"""What every worker imports sooner or later, so that it is imported once, before they are forked."""

import httpx
import redis.backoff
import redis.retry
from dspy.clients.engines import lm15_engine

import dspy_prod.stores.redis.store
import dspy_prod.stores.sqlite.store

__all__ = ["dspy_prod", "httpx", "lm15_engine", "redis"]
