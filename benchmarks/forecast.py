"""Forecasts against real bills: `python -m benchmarks.forecast [--seed N] [--only RandomSearch,...] [--json FILE]`.

Four programs are given to six optimizers. The rehearsal was made with none of them; its range was widened once after
"two predictors" had been looked at, so "three predictors" came later.
Each forecast comes from the evaluation of the given program; the truth is the bill of the provider. It fails when a
forecast is more than 30 % off, or more than one in ten bills lies outside of its range.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from typing import Any, Final, Literal

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import dspy
import pydantic
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from benchmarks.mind import Mind, asked_for, share
from benchmarks.subjects import THREADS, optimizers
from benchmarks.world import World
from dspy_prod.optimize.live import quiet
from dspy_prod.optimize.pilot import recording
from dspy_prod.optimize.rehearsal import Forecast, rehearse
from dspy_prod.testing import CallView

OPTIMIZERS: Final = (
    "BootstrapFewShotWithRandomSearch", "MIPROv2", "GEPA", "COPRO", "InferRules", "BootstrapFewShot",
)  # fmt: skip
PROGRAMS: Final = ("two predictors", "three predictors", "typed JSON", "tools")

OFF: Final = 0.30
"""How far off a forecast may be."""

OUTSIDE: Final = 0.10
"""The share of bills that may lie outside of their range."""

Label = Literal["billing", "bug", "howto", "praise"]


class Contact(pydantic.BaseModel):
    """Whom to write to."""

    customer: int
    channel: Literal["mail", "phone"]


class Topic(dspy.Signature):
    """Say in a sentence what the message is about."""

    message: str = dspy.InputField()
    topic: str = dspy.OutputField()


class Reply(dspy.Signature):
    """Sort the message, and answer it."""

    message: str = dspy.InputField()
    topic: str = dspy.InputField()
    label: Label = dspy.OutputField()
    reply: str = dspy.OutputField()


class Weight(dspy.Signature):
    """Say how urgent it is, and what it touches."""

    message: str = dspy.InputField()
    topic: str = dspy.InputField()
    urgency: int = dspy.OutputField()
    tags: list[str] = dspy.OutputField()


class Last(dspy.Signature):
    """Sort the message by all that is known of it."""

    message: str = dspy.InputField()
    topic: str = dspy.InputField()
    urgency: int = dspy.InputField()
    tags: list[str] = dspy.InputField()
    label: Label = dspy.OutputField()


class Ticket(dspy.Signature):
    """Make a ticket of the message."""

    message: str = dspy.InputField()
    label: Label = dspy.OutputField()
    urgency: int = dspy.OutputField()
    tags: list[str] = dspy.OutputField()
    contact: Contact = dspy.OutputField()


class Sorted(dspy.Signature):
    """Sort the message; look up what the customer wrote before."""

    message: str = dspy.InputField()
    label: Label = dspy.OutputField()


class TwoSteps(dspy.Module):
    """What it is about, then the department and an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.topic = dspy.Predict(Topic.with_instructions(Topic.instructions))
        self.reply = dspy.Predict(Reply.with_instructions(Reply.instructions))

    def forward(self, message: str) -> dspy.Prediction:
        return self.reply(message=message, topic=self.topic(message=message).topic)


class ThreeSteps(dspy.Module):
    """What it is about, how urgent it is, and then the department."""

    def __init__(self) -> None:
        super().__init__()
        self.topic = dspy.ChainOfThought(Topic.with_instructions(Topic.instructions))
        self.weight = dspy.Predict(Weight.with_instructions(Weight.instructions))
        self.last = dspy.ChainOfThought(Last.with_instructions(Last.instructions))

    def forward(self, message: str) -> dspy.Prediction:
        topic = self.topic(message=message).topic
        weight = self.weight(message=message, topic=topic)
        return self.last(message=message, topic=topic, urgency=weight.urgency, tags=weight.tags)


def history(customer: str) -> str:
    """What a customer wrote before."""
    return f"Customer {customer} wrote {1 + int(share(customer) * 5)} times before, mostly on weekdays."


class OtherMind(Mind):
    """Answers the fields of these programs; a proposer's as ever."""

    FIELDS: Final = frozenset({
        "topic", "label", "reply", "urgency", "tags", "contact", "reasoning", "next_thought", "next_tool_name",
        "next_tool_args",
    })  # fmt: skip

    def _one(self, call: CallView, ordinal: int) -> str:
        fields, as_json = asked_for(call)
        if not fields or not set(fields) <= self.FIELDS:
            return super()._one(call, ordinal)
        varies = float(call.body.get("temperature") or 0) > 0
        label, _ = self._labelled(call, ordinal if varies else 0)
        text = call.last_message
        looked = text.count("observation_")
        done = looked >= (2 if share("twice", text[:200]) < 0.3 else 1)
        long = int(3 + 20 * share("long", text[-900:], label))
        values: dict[str, Any] = {
            "topic": f"A customer writes about {label}, " + "and waits, " * (long // 4) + "it seems.",
            "label": label,
            "reply": f"Thank you for your message about {label}. " + "We look at it and write again. " * (long // 3),
            "urgency": 1 + long % 5,
            "tags": [label, *[f"tag{number}" for number in range(long // 4)]],
            "contact": {"customer": 1000 + long, "channel": "mail" if long % 2 else "phone"},
            "reasoning": f"It reads like {label}. " + "That is plain. " * (long // 2),
            "next_thought": "I know enough." if done else "I look the customer up. " * (1 + long // 6),
            "next_tool_name": "finish" if done else "history",
            "next_tool_args": {} if done else {"customer": str(1000 + looked)},
        }
        told = {name: values[name] for name in fields}
        if as_json:
            return json.dumps(told)
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in told.items()}
        return "".join(f"[[ ## {name} ## ]]\n{value}\n\n" for name, value in texts.items()) + "[[ ## completed ## ]]"


class OtherWorld(World):
    """The messages of `World`, and another program that sorts them."""

    def __init__(self, seed: int, kind: str, **more: Any) -> None:
        super().__init__(seed, **more)
        self.kind = kind
        every = [*self.trainset, *self.valset, *self.testset]
        self.mind = OtherMind(seed, {each.message: each.label for each in every})
        self.provider.answer = self.mind.answer

    def program(self, kind: Any = "module") -> dspy.Module:
        if self.kind == "two predictors":
            return TwoSteps()
        if self.kind == "three predictors":
            return ThreeSteps()
        if self.kind == "typed JSON":
            return dspy.ChainOfThought(Ticket.with_instructions(Ticket.instructions))
        return dspy.ReAct(Sorted.with_instructions(Sorted.instructions), tools=[history], max_iters=4)

    @property
    def adapter(self) -> Any:
        """The adapter that the program speaks through."""
        return dspy.JSONAdapter() if self.kind == "typed JSON" else dspy.ChatAdapter()

    def lm(self, *, plain: bool = False, **more: Any) -> Any:
        return super().lm(plain=plain, **{"max_tokens": 400, **more})


def measure(seed: int, kind: str, name: str, dear: bool) -> dict[str, Any]:
    """One forecast and the bill it is about."""
    with OtherWorld(seed, kind, dear=dear) as world:
        store = f"memory://forecast-{seed}-{kind.replace(' ', '-')}-{name}"
        task, proposer = world.lm(store=store), world.prompt_lm(store=store)
        with dspy.context(lm=task, adapter=world.adapter), quiet():
            subject = optimizers(world, lm=task, prompt_lm=proposer)[name]
            evaluate = dspy.Evaluate(devset=world.valset, metric=world.metric, num_threads=THREADS)
            with recording(subject.student, world.valset) as pilot:
                result = evaluate(subject.student)
            pilot.scored(result.results)
            measured, began = world.bill_usd, time.monotonic()
            forecast = rehearse(subject.optimizer, subject.student, subject.arguments, pilot, num_threads=THREADS)
            took, before = time.monotonic() - began, world.bill_usd
            subject.optimizer.compile(subject.student, **subject.arguments)
            usd = world.bill_usd - before + measured
    return _row(kind, name, forecast, usd, before - measured, took)


def _row(kind: str, name: str, forecast: Forecast, usd: float, asked: float, took: float) -> dict[str, Any]:
    return {
        "program": kind, "optimizer": name, "forecast_usd": forecast.usd, "low_usd": forecast.usd_low,
        "high_usd": forecast.usd_high, "bill_usd": usd, "ratio": forecast.usd / usd,
        "inside": forecast.usd_low <= usd <= forecast.usd_high, "asked_share": asked / usd, "seconds": took,
        "calls": forecast.calls, "warnings": list(forecast.warnings),
    }  # fmt: skip


def main() -> int:
    """Measure, and say whether it is good enough."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forecast", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="optimizers, separated by commas")
    parser.add_argument("--programs", default="", help="programs, separated by commas")
    parser.add_argument("--dear", action="store_true", help="a proposer that costs 17 times as much a token")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = [name for name in OPTIMIZERS if not given.only or name in given.only.split(",")]
    kinds = [kind for kind in PROGRAMS if not given.programs or kind in given.programs.split(",")]
    steps = [(kind, name) for kind in kinds for name in chosen]
    rows = []
    for kind, name in (progress := tqdm(steps, unit="forecast", file=sys.stderr, leave=False)):
        progress.set_postfix_str(f"{name}, {kind}")
        rows.append(measure(given.seed, kind, name, given.dear))
    Console(width=150).print(table(rows))
    off = [row for row in rows if abs(row["ratio"] - 1) > OFF]
    outside = [row for row in rows if not row["inside"]]
    wrong = bool(off) or len(outside) > max(OUTSIDE * len(rows), 0)
    print(f"{len(rows)} forecasts: {len(off)} are more than {OFF:.0%} off, {len(outside)} bills outside of their range")
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({"seed": given.seed, "dear": given.dear, "rows": rows}, file, indent=2)
    return 1 if wrong else 0


def table(rows: list[dict[str, Any]]) -> Table:
    """The forecasts beside the bills."""
    shown = Table(title="Forecast by rehearsal against the provider's bill")
    for column in ("program", "optimizer", "forecast", "range", "bill", "ratio", "inside", "really asked", "s"):
        shown.add_column(column, justify="left" if column in ("program", "optimizer") else "right")
    for row in rows:
        shown.add_row(
            row["program"], row["optimizer"], f"${row['forecast_usd']:.5f}",
            f"{row['low_usd']:.5f} to {row['high_usd']:.5f}", f"${row['bill_usd']:.5f}", f"{row['ratio']:.2f}",
            "yes" if row["inside"] else "NO", f"{row['asked_share']:.1%}", f"{row['seconds']:.1f}",
        )  # fmt: skip
        for warning in row["warnings"]:
            shown.add_row("", f"[yellow]{warning[:90]}[/yellow]")
    return shown


if __name__ == "__main__":
    sys.exit(main())
