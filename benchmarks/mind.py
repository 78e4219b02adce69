"""The model that answers in `benchmarks.world`: right or wrong by a rule, and a proposer that proposes.

Whether an answer is right is a function of the example and the prompt: more and better demonstrations and certain
words in the instructions help. Nothing is drawn at random, so a run that is repeated meets the same world.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dspy_prod.testing import CallView

LABELS = ("billing", "bug", "howto", "praise")

ADVICE = {
    "intent": "Name the intent of the customer before you decide.",
    "money": "Anything about money, invoices or refunds has priority.",
    "verb": "Look at the main verb of the message.",
    "tone": "Judge the tone only when nothing is asked.",
    "product": "A product that does not do what it should is a defect.",
    "first": "The first sentence counts more than the rest.",
    "short": "Answer with one short word.",
    "polite": "Stay polite at all times.",
    "careful": "Be careful: the obvious label is often wrong.",
    "example": "Compare with each example before you answer.",
    "question": "A question about how to do something is not a complaint.",
    "expert": "You are an expert in customer support.",
}
"""A word and a sentence that holds it. Which words help, and by how much, depends on the world's seed."""

_CHAT = re.compile(r"`\[\[ ## (\w+) ## \]\]`")
_JSON = re.compile(r"`(\w+)`")
_MESSAGE = re.compile(r"\[\[ ## message ## \]\]\n(.*?)(?:\n|$)")
_CURRENT = re.compile(r"\[\[ ## current_instruction ## \]\]\n(.*?)\n\n\[\[ ##", re.DOTALL)
_TASK_FIELDS = frozenset({"label", "reasoning"})


def share(*parts: Any) -> float:
    """A number from 0 to 1 that looks drawn, and is always the same for the same parts."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


class Mind:
    """Answers requests; safe to ask from any thread.

    Args:
        seed: which words and demonstrations help.
        labels: message → its right label.
        varied: whether the same request at a temperature above 0 is answered otherwise the next time.
    """

    def __init__(self, seed: int, labels: Mapping[str, str], *, varied: bool = True) -> None:
        self.seed = seed
        self.labels = labels
        self.varied = varied
        self.asked: Counter[str] = Counter()
        """How often each kind of request came: "task", or the first field that a proposer was asked for."""
        self._times: Counter[str] = Counter()
        self._lock = threading.Lock()
        ranked = sorted(ADVICE, key=lambda word: share(seed, "word", word))
        self.gains = dict(zip(ranked, (0.14, 0.12, 0.10, 0.08, 0.06, 0.04, -0.04, -0.08), strict=False))

    def answer(self, call: CallView) -> Any:
        """What the provider says to a request, as `Provider(answer=...)` takes it."""
        with self._lock:
            key = json.dumps([call.messages, call.body.get("temperature")], sort_keys=True)
            first = self._times[key]
            self._times[key] += call.n
            self.asked[kind_of(call)] += 1
        answers = [self._one(call, first + position) for position in range(call.n)]
        return answers if call.n > 1 else answers[0]

    def _one(self, call: CallView, ordinal: int) -> str:
        """The answer number `ordinal` to one and the same request."""
        fields, as_json = asked_for(call)
        if not fields:
            return self._reflected(call, ordinal)
        if set(fields) <= _TASK_FIELDS:
            varies = self.varied and float(call.body.get("temperature") or 0) > 0
            label, sure = self._labelled(call, ordinal if varies else 0)
            graded = "probabilities" in call.prompt
            values = {"reasoning": f"It reads like {label}.", "label": self._graded(label, sure) if graded else label}
        else:
            values = self._proposed(call, ordinal)
        told = {name: values.get(name, f"{name} of the task") for name in fields}
        if as_json:
            return json.dumps({name: json.loads(v) if v.startswith("{") else v for name, v in told.items()})
        return "".join(f"[[ ## {name} ## ]]\n{value}\n\n" for name, value in told.items()) + "[[ ## completed ## ]]"

    # -- the task ------------------------------------------------------------------------------------------------------
    def skill(self, instructions: str, demos: list[str], label: str) -> float:
        """The share of messages with this label that a prompt gets right, before its luck with each of them."""
        lowered = instructions.lower()
        total = 0.34
        for word, gain in self.gains.items():
            if word in lowered:
                total += gain * (1.6 if share(self.seed, "suits", word, label) < 0.5 else 0.4)
        total += sum(0.07 * share(self.seed, "demo", demo) for demo in demos[:5])
        return min(total, 0.96)

    def _labelled(self, call: CallView, ordinal: int) -> tuple[str, float]:
        messages = call.messages
        system = "\n".join(str(m.get("content")) for m in messages if m.get("role") == "system")
        instructions = system.rpartition("objective is:")[2] or system
        texts = [str(m.get("content")) for m in messages if m.get("role") == "user"]
        found = _MESSAGE.search(texts[-1])
        message = found[1].strip() if found else ""
        right = self.labels.get(message)
        if right is None:
            return LABELS[0], 0.3
        demos = [match[1].strip() for text in texts[:-1] if (match := _MESSAGE.search(text))]
        luck = 0.12 * (share(self.seed, message, instructions, demos, ordinal) - 0.5)
        margin = self.skill(instructions, demos, right) + luck - share(self.seed, "hard", message)
        if margin > 0:
            return right, margin
        wrong = [label for label in LABELS if label != right]
        return wrong[int(share(self.seed, "wrong", message, instructions) * 2.999)], -margin

    def _graded(self, label: str, sure: float) -> str:
        """A distribution over the labels that leans to the first one, which calibration can mend."""
        weights = {each: 0.10 + (0.25 if each == LABELS[0] else 0.0) for each in LABELS}
        weights[label] += 0.15 + sure
        total = sum(weights.values())
        odds = {each: round(weight / total, 4) for each, weight in weights.items()}
        return json.dumps({"probabilities": odds, "confidence": round(min(1.0, 0.4 + sure), 3)})

    # -- proposals -----------------------------------------------------------------------------------------------------
    def advice(self, prompt: str, ordinal: int, most: int) -> str:
        """Some sentences of advice: which, and how many, follows from the request and from how often it came."""
        ranked = sorted(ADVICE, key=lambda word: share(self.seed, "advice", prompt, ordinal, word))
        count = 1 + int(share(self.seed, "count", prompt, ordinal) * most * 0.999)
        return " ".join(ADVICE[word] for word in ranked[:count])

    def _proposed(self, call: CallView, ordinal: int) -> dict[str, str]:
        advice = self.advice(call.prompt, ordinal, 4)
        names = re.findall(r'"(\w[\w.]*)"', call.prompt.rpartition("[[ ## module_names ## ]]")[2].partition("]")[0])
        return {
            "proposed_instruction": f"Sort the customer's message under one of four labels. {advice}",
            "proposed_prefix_for_output_field": "Label:",
            "new_instruction": self._bettered(call.last_message, ordinal),
            "natural_language_rules": f"1. {advice}",
            "module_advice": json.dumps({name: self.advice(call.prompt, ordinal, 2) for name in names}),
            "observations": "Short messages of customers, each under one of four labels.",
            "summary": "Customers' messages with four labels.",
            "reasoning": "The examples have this in common.",
        }

    def _reflected(self, call: CallView, ordinal: int) -> str:
        """GEPA's reflection: the instruction it shows, with more advice."""
        return f"```\n{self._bettered(call.last_message, ordinal)}\n```"

    def _bettered(self, prompt: str, ordinal: int) -> str:
        """The instruction that a request shows, with more advice."""
        shown = _CURRENT.search(prompt)
        blocks = prompt.split("```")
        current = shown[1].strip() if shown else blocks[1].strip() if len(blocks) > 2 else "Sort the message."
        return f"{current} {self.advice(prompt, ordinal, 2)}"


def asked_for(call: CallView) -> tuple[list[str], bool]:
    """The output fields that an adapter asks for, and whether as JSON; none when no adapter wrote the request."""
    last = call.last_message
    for ask, pattern, as_json in (
        ("Respond with the corresponding output fields", _CHAT, False),
        ("Respond with a JSON object in the following order of fields", _JSON, True),
    ):
        if ask in last:
            names = pattern.findall(last[last.rindex(ask) :])
            return list(dict.fromkeys(name for name in names if name != "completed")), as_json
    return [], False


def kind_of(call: CallView) -> str:
    """ "task", or what a proposer was asked for."""
    fields, _ = asked_for(call)
    if fields and set(fields) <= _TASK_FIELDS:
        return "task"
    return next((name for name in fields if name not in ("reasoning", "discussion")), "reflection")
