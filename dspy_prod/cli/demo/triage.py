"""The program that `dspy-prod demo` runs: triage of support messages, and the labelled messages to run it on.

The messages are invented; their orders, names and addresses (example.com) belong to nobody.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Final, Literal, get_args

import dspy
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema
from rich.console import Console

from dspy_prod.errors import ConfigError
from dspy_prod.privacy.error_text import error_text

Category = Literal["billing", "technical", "account", "shipping"]
Urgency = Literal["low", "normal", "high"]
CATEGORIES: tuple[str, ...] = get_args(Category)
URGENCIES: tuple[str, ...] = get_args(Urgency)


@dataclass(frozen=True)
class Message:
    """A support message, who wrote it, and the labels a person would give it."""

    id: str
    user: str
    tenant: str
    message: str
    category: Category
    urgency: Urgency


class Sentence(str):
    """A string that the JSON schema limits to one short sentence: small models do not find the end by themselves.

    Only the request says so. An answer of another length is as good, from a model that is not held to a schema.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler(str)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^[^.!?]{8,70}\.$"}


class SortMessage(dspy.Signature):
    """Sort a customer's support message."""

    message: str = dspy.InputField()
    category: Category = dspy.OutputField()
    urgency: Urgency = dspy.OutputField()
    reply: Sentence = dspy.OutputField()


class Triage(dspy.Module):
    """Sorts a message, with the most similar of 32 answered examples as demos.

    A model of 135 million parameters guesses without them. The similarity is an overlap of words, so a call needs no
    second model. Most of the answer is in the example: on `messages()`, with SmolLM2 and one example, 47 of 60
    categories are right, and 47 of 60 if the example's own category is taken and no model asked. Demos that an
    optimizer found replace these.

    Args:
        examples: how many demos a call carries. Each costs about 60 input tokens; two did no better than one.
    """

    def __init__(self, examples: int = 1) -> None:
        super().__init__()
        self.examples = examples
        self.sort = dspy.Predict(SortMessage)

    def forward(self, message: str) -> Any:
        return self.sort(message=message, demos=self._demos(message))

    async def aforward(self, message: str) -> Any:
        return await self.sort.acall(message=message, demos=self._demos(message))

    def _demos(self, message: str) -> list[Any]:
        return self.sort.demos or similar_examples(message, self.examples)


def messages() -> list[Message]:
    """The 60 labelled messages, always in the same order; users, categories and urgencies are mixed throughout."""
    return [Message(**row) for row in _rows("support_messages.jsonl")]


def similar_examples(message: str, count: int) -> list[Any]:
    """The answered examples that share the rarest words with a message, as `dspy.Example`s, the most similar last."""
    if count < 1:
        return []
    words = _words(message)
    index, weights = _index()

    def similarity(entry: tuple[frozenset[str], Any]) -> float:
        # fsum: the order of a set differs between processes, the demos (and so the cache's key) must not.
        return math.fsum(weights[word] for word in words & entry[0]) / math.sqrt(len(entry[0]))

    ranked = sorted(index, key=similarity)
    return [example for _, example in ranked[-count:]]


@cache
def _index() -> tuple[list[tuple[frozenset[str], Any]], dict[str, float]]:
    examples = [dspy.Example(**row).with_inputs("message") for row in _rows("triage_examples.jsonl")]
    index = [(_words(example.message), example) for example in examples]
    occurrences = Counter(word for words, _ in index for word in words)
    return index, {word: math.log1p(len(index) / count) for word, count in occurrences.items()}


def _words(text: str) -> frozenset[str]:
    # The first five letters stand for a word, so that "refunded" meets "refund".
    return frozenset(word[:5] for word in re.findall(r"\w+", text.lower()))


def _rows(name: str) -> list[dict[str, Any]]:
    text = (files("dspy_prod.cli") / "data" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# -- as versions in MLflow: a first draft, and the version that runs -------------------------------------------------
NAME: Final = "triage"
DRAFT: Final = (
    "You are a helpful assistant. Read what the customer wrote and decide which category it belongs to and how urgent "
    "it is. Then write a reply."
)
DRAFT_MESSAGE: Final = "demo: a first draft"
MESSAGE: Final = "demo: one short instruction, which small models follow better"
REASON: Final = "dspy-prod demo"


def published(console: Console, uri: str) -> tuple[Triage, str | None]:
    """The program to run, as a version in MLflow's prompt registry; None, and a line that says why, when not.

    Two versions are published and promoted one after the other, so that the second is `production` and the first
    `previous`. Done again, it changes nothing. A program of that name which is not the demo's is left alone.

    Args:
        console: for the line. uri: MLflow's tracking URI.
    """
    from dspy_prod import registry

    try:
        found = registry.versions(NAME, tracking_uri=uri) if NAME in registry.programs(tracking_uri=uri) else []
        if any(version.message not in (DRAFT_MESSAGE, MESSAGE) for version in found):
            console.print(f"MLflow has a program {NAME!r} that is not the demo's: the demo publishes none.")
            return Triage(), None
        draft, final = Triage(), Triage()
        draft.sort.signature = draft.sort.signature.with_instructions(DRAFT)
        with dspy.context(lm=None, adapter=dspy.JSONAdapter()):  # no LM: the versions are the same with any model
            first = registry.publish(draft, NAME, message=DRAFT_MESSAGE, tracking_uri=uri)
            second = registry.publish(final, NAME, message=MESSAGE, tracking_uri=uri)
        if "production" not in second.aliases:
            for version in (first, second):
                registry.promote(NAME, version, reason=REASON, tracking_uri=uri)
        return registry.load(str(second), Triage(), tracking_uri=uri), str(second)
    except (registry.RegistryError, ConfigError) as error:
        console.print(f"The demo's prompts are not in MLflow: {error_text(error)}", markup=False)
        return Triage(), None
