"""Whether an LM would work, without spending: `dspy-prod check`. Nothing is generated, and no key is shown.

The one thing that is sent is `GET /models`, which OpenAI-compatible providers answer for nothing.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator

from dspy_prod.lm.embedder import Embedder
from dspy_prod.lm.lm import LM
from dspy_prod.pipeline.batching import EmbeddingRoute
from dspy_prod.pipeline.routes import Route
from dspy_prod.privacy.names import bare_url
from dspy_prod.privacy.outward import outward
from dspy_prod.records import usd
from dspy_prod.stores.base import CachedAnswer, Store
from dspy_prod.telemetry.tap import Frozen

PATIENCE: Final = 5.0
"""Seconds an address gets to answer, and a store to write."""

TYPICAL_INPUT: Final = 1_000
"""Input tokens of the call whose bound is compared with budgets and limits."""

Outcome = Literal["ok", "unsure", "not tried", "fails"]


class Finding(Frozen):
    """One thing that was looked at.

    Attributes:
        route: the model, the store's URL, or the table.
        what: `key`, `address`, `price`, `limit`, `budget`, `store`, `table` or `configuration`.
        outcome: `fails` when a call would fail for it.
        detail: what was found, and the remedy.
        of: what the file calls the LM or embedder, such as `lm.small`; empty where it has one LM alone.
    """

    route: str
    what: str
    outcome: Outcome
    detail: Annotated[str, AfterValidator(outward)]
    of: str = ""


def check(lm: LM | Embedder, of: str = "") -> list[Finding]:
    """What would become of the calls of an LM or embedder on each of its routes, and whether its store can be written.

    Args:
        of: what it is called in the file.
    """
    found: list[Finding] = []
    for route in lm.pipeline.routes:
        look = _Route(lm, route)
        found += [look.key(), look.address(), look.price(), *look.limits(), *look.budgets()]
    return [*[one.model_copy(update={"of": of}) for one in found], _store(lm.pipeline.store)]


class _Route:
    """What is to be known of one route."""

    def __init__(self, lm: LM | Embedder, route: Route) -> None:
        self.lm = lm
        self.route = route
        self.clients = route.upstream.clients
        self.native = _native(route)
        self.variable: str | None = getattr(self.native, "env_key", None)
        rates = route.rates()
        if isinstance(lm, LM):
            known = (route.defaults.get("max_tokens"), *map(lm.kwargs.get, ("max_tokens", "max_completion_tokens")))
            self.tokens = next(filter(None, known), None if rates is None else rates.max_output_tokens)
        else:
            self.tokens = 0  # vectors are not generated
        self.bound = None if rates is None or self.tokens is None else rates.bound(TYPICAL_INPUT, int(self.tokens))

    def say(self, what: str, outcome: Outcome, detail: str) -> Finding:
        return Finding(route=self.route.model, what=what, outcome=outcome, detail=detail)

    def secret(self) -> str | None:
        """The key that calls would carry."""
        given = self.clients.get("api_key")
        if callable(given):
            given = given()
        return str(given) if given else os.environ.get(self.variable or "")

    def key(self) -> Finding:
        if not isinstance(self.route.upstream.spec, str):
            return self.say("key", "ok", "an engine object brings its own")
        if self.clients.get("api_key"):
            return self.say("key", "ok", "given to the LM")
        if self.native is None:
            return self._litellm_key()
        if self.native.placeholder_key is not None or self.native.credential_policy != "key":
            return self.say("key", "ok", "none needed, or found by the provider's own rules")
        name = self.variable or "the provider's variable"
        if self.secret():
            return self.say("key", "ok", f"in ${name}")
        return self.say("key", "fails", f"${name} is not set; set it, or name another with api_key_env")

    def _litellm_key(self) -> Finding:
        from dspy_prod.compat.litellm import missing_keys

        missing = missing_keys(self.route.model)
        if missing is None:
            return self.say("key", "unsure", "LiteLLM does not say what this provider needs")
        if missing:
            return self.say("key", "fails", f"not set: {', '.join(f'${name}' for name in missing)}")
        return self.say("key", "ok", "in the environment")

    def address(self) -> Finding:
        """`GET /models`, where the provider speaks OpenAI's language."""
        url = self._url()
        if url is None:
            return self.say("address", "not tried", "this provider has no free address to ask")
        shown, secret = bare_url(url), self.secret()
        asked = urllib.request.Request(f"{url.rstrip('/')}/models")
        if secret:
            asked.add_header("Authorization", f"Bearer {secret}")
        try:
            with _OPENER.open(asked, timeout=PATIENCE) as answer:
                names = _names(answer.read(1_000_000))
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                return self.say("address", "fails", f"{shown} refuses the key ({error.code})")
            if error.code in (404, 405, 501):
                return self.say("address", "unsure", f"{shown} is there, but lists no models ({error.code})")
            return self.say("address", "fails", f"{shown} answers {error.code}")
        except Exception as error:
            cause = getattr(error, "reason", error)
            return self.say("address", "fails", f"{shown} cannot be reached ({type(cause).__name__}); check api_base")
        name = self.route.model.split("/", 1)[-1]
        if names and name not in names:
            return self.say("address", "unsure", f"{shown} takes the key, but does not list {name!r}")
        return self.say("address", "ok", f"{shown} takes the key" if secret else f"{shown} answers")

    def _url(self) -> str | None:
        if not isinstance(self.route.upstream.spec, str) or (self.native is None and not self._own_address()):
            return None
        if self.native is not None and not self.native.adapter.startswith("OpenAI"):
            return None
        own = self._own_address()
        if own is not None:
            return own
        try:
            engine: Any = self.route.upstream._native_engine()
            found = getattr(engine.router.lm(self.native.requested), "base_url", None)
        except Exception:  # no key: that is told already
            return None
        return found if isinstance(found, str) else None

    def _own_address(self) -> str | None:
        url = self.clients.get("api_base") or self.clients.get("base_url")
        return str(url) if url else None

    def price(self) -> Finding:
        if self.route.rates() is not None:
            return self.say("price", "ok", "known")
        guarded = bool(self.lm.pipeline.rules or self.route.rules)
        remedy = f"pass prices for {self.route.model!r} (USD per million tokens)"
        return self.say("price", "fails" if guarded else "unsure", f"not known: {remedy}")

    def limits(self) -> list[Finding]:
        tpm = self.route.limit.tpm
        if tpm is None or not self.tokens:
            return []
        if self.tokens > tpm:
            return [self.say("limit", "fails", f"max_tokens={self.tokens} never fits into tpm={tpm:g}")]
        return [self.say("limit", "ok", f"{self.tokens} output tokens of tpm={tpm:g}")]

    def budgets(self) -> list[Finding]:
        found = []
        for rule in (*self.lm.pipeline.rules, *self.route.rules):
            title, limit = rule.options.title, rule.limit
            if self.bound is None:
                if self.tokens is None:
                    detail = f"{title}: a call cannot be bounded; set max_tokens"
                    found.append(self.say("budget", "fails", detail))
                continue
            share = f"{title}: a call of {TYPICAL_INPUT} tokens may cost {usd(self.bound):.6f} of {usd(limit):g} USD"
            if self.bound > limit:
                found.append(self.say("budget", "fails", f"{share}: every such call is refused"))
            else:
                found.append(self.say("budget", "ok", share))
        return found


class _Stay(urllib.request.HTTPRedirectHandler):
    """A key must not follow a redirect."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER: Final = urllib.request.build_opener(_Stay)


def _native(route: Route) -> Any:
    """How the native engine would reach a model, None where it does not."""
    if isinstance(route, EmbeddingRoute) or not isinstance(route.upstream.spec, str):
        return None
    selection = route.upstream._select()
    return selection.resolution if selection.native else None


def _names(body: bytes) -> set[str]:
    try:
        return {str(model["id"]) for model in json.loads(body)["data"]}
    except (ValueError, KeyError, TypeError):
        return set()


def _store(store: Store) -> Finding:
    """Whether the store takes a write: an answer that has expired already."""
    problem = ""
    try:
        store.cache_put(b"dspy-prod check", CachedAnswer(b"null", 0.0, 0.0), max_entries=1_000_000, max_bytes=1 << 40)
        if not store.flush(PATIENCE):
            problem = str(getattr(store, "problems", {}).get("failing") or "it does not take writes")
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        return Finding(route=store.url, what="store", outcome="fails", detail=problem)
    kept = "can be written" if store.durable else "in memory: gone when the process ends"
    return Finding(route=store.url, what="store", outcome="ok", detail=kept)
