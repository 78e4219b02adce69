"""Every metric by name: its unit, its kind and what it tells. Dashboards and alarms are built on this.

`gen_ai.*` are named by OpenTelemetry's semantic conventions for generative AI, everything else is `dspy_prod.*`. In
Prometheus dots are underscores, units are written out and counters end in `_total`, see `exposition.name_of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

Shape = Literal["histogram", "counter", "gauge"]

SECONDS: Final = tuple([0.01 * 2**n for n in range(16)])
"""Bounds of the buckets for seconds: those of the conventions, 10 ms to 82 s, and two more for long reasoning."""
WAITS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKENS: Final = tuple([4**n for n in range(14)])
"""Bounds of the buckets for tokens: those of the conventions."""


class Metric(NamedTuple):
    """What is known of one metric.

    Attributes:
        shape: how it adds up.
        unit: as UCUM writes it; in braces what is counted.
        meaning: what it tells.
        buckets: bounds of a histogram's.
    """

    shape: Shape
    unit: str
    meaning: str
    buckets: tuple[float, ...] = ()


DURATION: Final = "gen_ai.client.operation.duration"
TOKEN_USAGE: Final = "gen_ai.client.token.usage"
WAIT: Final = "dspy_prod.admission.wait"
ATTEMPTS: Final = "dspy_prod.attempts"
COST: Final = "dspy_prod.cost"
UNKNOWN_COST: Final = "dspy_prod.cost.unknown"
SAVED: Final = "dspy_prod.cost.saved"
TOKENS_USED: Final = "dspy_prod.tokens"
HITS: Final = "dspy_prod.cache.hits"
MISSES: Final = "dspy_prod.cache.misses"
REJECTIONS: Final = "dspy_prod.rejections"
RETRIES: Final = "dspy_prod.retries"
FALLBACKS: Final = "dspy_prod.fallbacks"
FALLBACK_RESPONSES: Final = "dspy_prod.fallback_responses"
THROTTLED: Final = "dspy_prod.throttled"
TRANSITIONS: Final = "dspy_prod.breaker.transitions"
DECISIONS: Final = "dspy_prod.experiment.decisions"
HAPPENED: Final = "dspy_prod.events"
LOST: Final = "dspy_prod.metrics.lost"
BREAKER: Final = "dspy_prod.breaker.state"
BUDGET_LIMIT: Final = "dspy_prod.budget.limit"
BUDGET_USED: Final = "dspy_prod.budget.used"
BUDGET_HELD: Final = "dspy_prod.budget.held"
BUDGET_LEFT: Final = "dspy_prod.budget.left"
LIMITER_LEFT: Final = "dspy_prod.limiter.left"
LIMITER_LIMIT: Final = "dspy_prod.limiter.limit"
LIMITER_WAITING: Final = "dspy_prod.limiter.waiting"
LIMITER_PAUSED: Final = "dspy_prod.limiter.paused"
ENTRIES: Final = "dspy_prod.cache.entries"
UNWRITTEN: Final = "dspy_prod.store.unwritten"
STORE_FAILING: Final = "dspy_prod.store.failing"
DROPPED: Final = "dspy_prod.store.dropped"
TRACES_WAITING: Final = "dspy_prod.tracking.waiting"
TRACES_LOST: Final = "dspy_prod.tracking.lost"
AGE: Final = "dspy_prod.standing.age"

CATALOGUE: Final[Mapping[str, Metric]] = {
    DURATION: Metric("histogram", "s", "Seconds from sending a request to the end of its answer.", SECONDS),
    TOKEN_USAGE: Metric("histogram", "{token}", "Tokens of one request, as the provider told.", TOKENS),
    WAIT: Metric("histogram", "s", "Seconds a call waited for a limit or a budget; only those that did.", WAITS),
    ATTEMPTS: Metric("counter", "{attempt}", "Requests that were sent upstream, by how they ended."),
    COST: Metric("counter", "USD", "What was billed; with estimated=true it is an upper bound."),
    UNKNOWN_COST: Metric("counter", "{attempt}", "Requests of which the cost is not known: they are in no sum."),
    SAVED: Metric("counter", "USD", "What cached answers would have cost, as far as that is known."),
    TOKENS_USED: Metric("counter", "{token}", "Tokens as told; cached are part of input, reasoning of output."),
    HITS: Metric("counter", "{answer}", "Answers for which nothing was sent: cached, stale, or replayed by a run."),
    MISSES: Metric("counter", "{lookup}", "Lookups in the cache that found nothing."),
    REJECTIONS: Metric("counter", "{rejection}", "Refusals by a policy, by route and reason."),
    RETRIES: Metric("counter", "{retry}", "Attempts that were followed by another one on the same route."),
    FALLBACKS: Metric("counter", "{fallback}", "Calls that went on with another model, by that model."),
    FALLBACK_RESPONSES: Metric("counter", "{answer}", "Answers that Production gave in place of the program's."),
    THROTTLED: Metric("counter", "{answer}", "Answers 429 of a provider."),
    TRANSITIONS: Metric("counter", "{transition}", "Changes of a circuit breaker, by the state it entered."),
    DECISIONS: Metric("counter", "{decision}", "What experiments decided: stage, promote, rollback, pause, drop."),
    HAPPENED: Metric("counter", "{event}", "Everything else that listeners are told, by name."),
    LOST: Metric("counter", "{record}", "Records and events that no metric counts, as they came too fast."),
    BREAKER: Metric("gauge", "{state}", "State of a circuit: 0 closed or disabled, 1 half-open, 2 open."),
    BUDGET_LIMIT: Metric("gauge", "USD", "What a budget allows in its window."),
    BUDGET_USED: Metric("gauge", "USD", "What was spent of it; of a scoped budget, by whom it is used most."),
    BUDGET_HELD: Metric("gauge", "USD", "What calls in flight have reserved of it."),
    BUDGET_LEFT: Metric("gauge", "USD", "What a new call can still reserve."),
    LIMITER_LEFT: Metric("gauge", "{unit}", "Requests and tokens left in this minute, by dimension."),
    LIMITER_LIMIT: Metric("gauge", "{unit}", "Requests and tokens allowed in a minute, by dimension."),
    LIMITER_WAITING: Metric("gauge", "{call}", "Calls in line for a limiter."),
    LIMITER_PAUSED: Metric("gauge", "s", "Seconds for which a provider asked to send nothing."),
    ENTRIES: Metric("gauge", "{answer}", "Answers that the cache has in memory."),
    UNWRITTEN: Metric("gauge", "{record}", "Records that wait to be written to the store."),
    STORE_FAILING: Metric("gauge", "{state}", "1 while a store cannot be read or written, else 0."),
    DROPPED: Metric("gauge", "{operation}", "Operations that a store has lost since the process began."),
    TRACES_WAITING: Metric("gauge", "{trace}", "Traces that are not in MLflow yet."),
    TRACES_LOST: Metric("gauge", "{trace}", "Traces and messages that MLflow lacks since the process began."),
    AGE: Metric("gauge", "s", "Seconds since budgets, limiters and stores were read: it grows while a store is slow."),
}
"""Every metric by name."""
