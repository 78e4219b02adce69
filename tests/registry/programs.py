"""Programs that are published in the tests, each with demos and instructions that ask something of the registry."""

from __future__ import annotations

import datetime as dt
import enum
from typing import Any, Literal

import dspy
import pydantic


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Ticket(pydantic.BaseModel):
    title: str
    opened: dt.date
    tags: list[str] = []


class Sort(dspy.Signature):  # type: ignore[misc]
    """Sort the ticket. Answer as {"queue": {{queue}}} and never as {% raw %} {{ x }} {% endraw %} or {}."""

    ticket: Ticket = dspy.InputField(desc="with {braces} and {{double}} ones")
    color: Color = dspy.InputField()
    queue: Literal["bug", "question"] = dspy.OutputField(desc="one of {{both}}")
    reply: Ticket = dspy.OutputField()


class Look(dspy.Signature):  # type: ignore[misc]
    """Describe the picture."""

    picture: dspy.Image = dspy.InputField()
    others: list[dspy.Image] = dspy.InputField()
    history: dspy.History = dspy.InputField()
    answer: str = dspy.OutputField()


def search(query: str) -> str:
    """Look it up."""
    return query


def qa() -> dspy.Predict:
    predict = dspy.Predict("question, context: list[str] -> answer")
    predict.signature = predict.signature.with_instructions("Use the context. Write {{x}} as {{x}}, {y} and {%z%}.")
    predict.demos = [
        {"question": "a {{question}}?", "context": ["{}", "{{}}"], "answer": "{{answer}} \u2060 {\u2060{"},
        dspy.Example(question="b?", context=["c"], answer="d", augmented=True).with_inputs("question", "context"),
        dspy.Example(question="only a question", answer="incomplete"),
    ]
    return predict


def thinking() -> dspy.ChainOfThought:
    program = dspy.ChainOfThought(Sort)
    ticket = Ticket(title="It {{crashes}}", opened=dt.date(2026, 2, 3), tags=["a", "ü"])
    program.predict.demos = [
        dspy.Example(ticket=ticket, color=Color.RED, reasoning="so", queue="bug", reply=ticket),
        {"ticket": ticket.model_dump(), "color": "blue", "reasoning": "{", "queue": "question", "reply": ticket},
    ]
    return program


def agent() -> dspy.ReAct:
    program = dspy.ReAct("question -> answer: float", tools=[search])
    program.react.demos = [
        {
            "question": "q",
            "trajectory": "t",
            "next_thought": "n",
            "next_tool_name": "search",
            "next_tool_args": {"a": 1},
        }
    ]
    program.extract.predict.signature = program.extract.predict.signature.with_instructions("Extract {{it}}.")
    return program


class Looking(dspy.Module):  # type: ignore[misc]
    """Pictures and conversations in demos."""

    def __init__(self) -> None:
        super().__init__()
        self.look = dspy.Predict(Look)

    def forward(self, **inputs: Any) -> Any:
        return self.look(**inputs)


def looking() -> Looking:
    program = Looking()
    picture = dspy.Image("https://example.com/a.png")
    history = dspy.History(messages=[{"picture": "p", "answer": "{{a}}"}])
    program.look.demos = [
        dspy.Example(picture=picture, others=[picture, picture], history=history, answer="A cat."),
        {"picture": dspy.Image("data:image/png;base64,AAAA"), "others": [], "history": history, "answer": "Nothing."},
    ]
    return program


class Nested(dspy.Module):  # type: ignore[misc]
    """Predictors in attributes, lists, dicts and other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.sort = dspy.Predict(Sort)
        self.steps = [dspy.Predict("a -> b"), dspy.ChainOfThought("b -> c")]
        self.experts = {
            "tax-law": dspy.Predict("c -> d"),
            "tax.law": dspy.Predict("c -> d"),
            "ü/ß": dspy.Predict("c->d"),
        }
        self.inner = Looking()

    def forward(self, **inputs: Any) -> Any:
        return self.steps[0](**inputs)


def nested() -> Nested:
    program = Nested()
    program.steps[0].demos = [{"a": "1", "b": "{{2}}"}]
    program.steps[0].signature = program.steps[0].signature.with_instructions("First {step}.")
    program.experts["tax-law"].demos = [dspy.Example(c="3", d="4").with_inputs("c")]
    program.inner.look.demos = looking().look.demos
    return program
