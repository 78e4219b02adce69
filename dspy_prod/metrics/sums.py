"""What records and events come to, by metric and attributes. Pure arithmetic: money in integers, no clock, no lock.

Attributes have bounds. Models, routes and reasons are few; users, tenants and sessions are not, so they are told only
where somebody asked for them, and only so many of each apart: all others are `(other)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from dspy_prod.errors import ConfigError
from dspy_prod.metrics import catalogue
from dspy_prod.records import ANSWERED, OTHER, REFUSED, CallRecord
from dspy_prod.telemetry.events import Event

Attributes = tuple[tuple[str, str], ...]
Observe = Callable[[str, float, Attributes], None]
"""Told a histogram's name, a value and its attributes."""

OPTIONAL: Final = ("user", "tenant", "session", "program", "experiment", "variant", "prompt_version", "run", "priority")
"""What a call's context says and `attributes=` may ask for, next to `tag:<key>`."""

MOST_SERIES: Final = 1_900
"""Sets of attributes of one metric; OpenTelemetry's own bound is 2,000."""

_PROVIDERS: Final = {
    "azure": "azure.ai.openai", "azure_ai": "azure.ai.inference", "bedrock": "aws.bedrock", "cohere_chat": "cohere",
    "gemini": "gcp.gemini", "google": "gcp.gemini", "mistral": "mistral_ai", "vertex_ai": "gcp.vertex_ai",
    "watsonx": "ibm.watsonx.ai", "xai": "x_ai",
}  # fmt: skip
"""What OpenTelemetry calls those that are not called as in DSPy."""

_COUNTED: Final = {
    "rejected": catalogue.REJECTIONS, "retry": catalogue.RETRIES, "fallback": catalogue.FALLBACKS,
    "fallback_response": catalogue.FALLBACK_RESPONSES, "throttled": catalogue.THROTTLED,
}  # fmt: skip
_ENTERED: Final = {"breaker_opened": "open", "breaker_half_open": "half_open", "breaker_closed": "closed"}
_WAITED_FOR: Final = frozenset({"requests", "tokens", "concurrency", "paused", "pacing"})
_SCALE: Final = {catalogue.COST: 1e9, catalogue.SAVED: 1e9}


class Sums:
    """See the module's docstring.

    Args:
        attributes: of `OPTIONAL`, and `tag:<key>`.
        most: values of each attribute that are told apart.
        observe: takes what goes into histograms.

    Raises:
        ConfigError: an attribute that there is not.
    """

    def __init__(self, attributes: tuple[str, ...], most: int, observe: Observe) -> None:
        for name in attributes:
            if name not in OPTIONAL and not (isinstance(name, str) and name.startswith("tag:") and name[4:]):
                raise ConfigError(f"attributes: {name!r} is none; use some of {', '.join(OPTIONAL)}, or 'tag:<key>'")
        self._asked = attributes
        self._most = most
        self._observe = observe
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._counts: dict[str, dict[Attributes, int]] = {}
        self._known: dict[str, set[str]] = {}

    def take(self, item: Any) -> None:
        """Count an event, or what a `telemetry.events.Meter` takes."""
        if isinstance(item, Event):
            self._event(item.name, item.data)
        else:
            self._record(*item)

    def told(self, metric: str) -> Iterator[tuple[float, Attributes]]:
        """The sums of one counter."""
        scale = _SCALE.get(metric)
        for attributes, count in self._counts.get(metric, {}).items():
            yield (count if scale is None else count / scale), attributes

    def add(self, metric: str, count: int, attributes: Attributes = ()) -> None:
        """Add to a counter."""
        series = self._counts.setdefault(metric, {})
        if attributes not in series and len(series) >= MOST_SERIES:
            attributes = tuple([(name, OTHER) for name, _ in attributes])
        series[attributes] = series.get(attributes, 0) + count

    def _record(self, record: CallRecord, saved: int | None, operation: str) -> None:
        if record.outcome == REFUSED:
            return  # an event tells of each of them, the ledger of few
        model = self.model(record.model)
        more = self._of_context(record.__getattribute__, dict(record.tags))
        if record.cached:
            self.add(catalogue.HITS, 1, (*model, ("dspy_prod.outcome", record.outcome), *more))
            if saved:
                self.add(catalogue.SAVED, saved, (*model, *more))
            return
        own = (*model, ("dspy_prod.route", self._one_of("route", record.route)), *more)
        self.add(catalogue.ATTEMPTS, 1, (*own, ("dspy_prod.outcome", record.outcome)))
        if record.cost_nano is None:
            self.add(catalogue.UNKNOWN_COST, 1, own)
        elif record.cost_nano:
            self.add(catalogue.COST, record.cost_nano, (*own, ("dspy_prod.estimated", str(record.estimated).lower())))
        called = (("gen_ai.operation.name", operation), *model, *more)
        if record.outcome in ANSWERED:
            self._observe(catalogue.DURATION, record.latency, called)
        else:
            error = self._one_of("error", record.error or record.outcome)
            self._observe(catalogue.DURATION, record.latency, (*called, ("error.type", error)))
        kinds = (
            ("input", record.input_tokens), ("output", record.output_tokens),
            ("cached", record.cached_tokens), ("reasoning", record.reasoning_tokens),
        )  # fmt: skip
        for kind, tokens in kinds:
            if tokens:
                self.add(catalogue.TOKENS_USED, tokens, (*own, ("gen_ai.token.type", kind)))
                if kind in ("input", "output"):
                    self._observe(catalogue.TOKEN_USAGE, tokens, (*called, ("gen_ai.token.type", kind)))

    def _event(self, name: str, data: Mapping[str, Any]) -> None:
        if name in _COUNTED:
            self.add(_COUNTED[name], 1, (*self._where(data), *self._of_context(data.get, data.get("tags") or {})))
        elif name == "waited":
            what = data["blocked_on"] if data["blocked_on"] in _WAITED_FOR else "budget"  # whose, is nobody's business
            where = (*self.model(data["model"]), ("dspy_prod.blocked_on", what))
            self._observe(catalogue.WAIT, data["seconds"], where)
        elif name in _ENTERED:
            self.add(catalogue.TRANSITIONS, 1, (*self.model(data["route"]), ("dspy_prod.state", _ENTERED[name])))
        elif name in ("experiment_moved", "experiment_alarm"):
            which = self._one_of("experiment", str(data["experiment"]))
            verdict = ("dspy_prod.verdict", str(data.get("verdict") or "none"))
            what = self._one_of("decision", str(data["what"]))
            self.add(catalogue.DECISIONS, 1, (("dspy_prod.experiment", which), ("dspy_prod.decision", what), verdict))
        elif name != "waiting":
            self.add(catalogue.HAPPENED, 1, (("dspy_prod.event", self._one_of("event", name)),))

    def _where(self, data: Mapping[str, Any]) -> Attributes:
        """Model, route and why, as far as an event tells."""
        model = data.get("model") or data.get("to")
        found = () if model is None else self.model(model)
        for field, attribute in (
            ("route", "dspy_prod.route"), ("reason", "dspy_prod.reason"), ("error", "error.type"),
        ):  # fmt: skip
            value = data.get(field)
            if isinstance(value, str) and value and " " not in value:  # a word; texts are for the log
                found = (*found, (attribute, self._one_of(field, value)))
        return found

    def _of_context(self, get: Callable[[str], Any], tags: Mapping[str, str]) -> Attributes:
        found = []
        for name in self._asked:
            value = tags.get(name[4:]) if name.startswith("tag:") else get(name)
            if value is not None:
                found.append((f"dspy_prod.{name.replace(':', '.')}", self._one_of(name, str(value))))
        return tuple(found)

    def model(self, model: str) -> Attributes:
        """Provider and model as OpenTelemetry has them, of a model as DSPy has it."""
        provider, slash, name = self._one_of("model", model).partition("/")
        if not slash:
            provider, name = "_OTHER", provider
        return ("gen_ai.provider.name", _PROVIDERS.get(provider, provider)), ("gen_ai.request.model", name)

    def _one_of(self, attribute: str, value: str) -> str:
        known = self._known.setdefault(attribute, set())
        if value not in known:
            if len(known) >= self._most:
                return OTHER
            known.add(value)
        return value
