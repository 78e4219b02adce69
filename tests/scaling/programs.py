"""Programs and metrics that worker processes import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import dspy


class TwoSteps(dspy.Module):
    """Asks for a hint, then for the answer; leaves a file that says which process does which example.

    Args:
        folder: for the files; None: none are left.
    """

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.hint = dspy.Predict("question -> hint")
        self.answer = dspy.Predict("question, hint -> answer")

    def forward(self, question: str) -> Any:
        if self.folder is not None:
            (self.folder / f"{os.getpid()} {question}").touch()
        hint = self.hint(question=question).hint
        return dspy.Prediction(answer=self.answer(question=question, hint=hint).answer, asked=question)


class Fails(dspy.Module):
    """Cannot answer what has a 3 in it."""

    def forward(self, question: str) -> Any:
        if "3" in question:
            raise ValueError(f"no answer to {question}")
        return dspy.Prediction(answer=question)


class Dies(dspy.Module):
    """Ends its process over what has a 3 in it."""

    def forward(self, question: str) -> Any:
        if "3" in question:
            os._exit(1)
        return dspy.Prediction(answer=question)


def even(example: Any, prediction: Any) -> float:
    """1 for every other example."""
    return float(example.number % 2 == 0)


def devset(count: int) -> list[Any]:
    """Examples with different questions."""
    return [
        dspy.Example(question=f"question {number:03}", number=number).with_inputs("question") for number in range(count)
    ]


def question_of(body: Any) -> tuple[str, int]:
    """(the question, 1 for the hint and 2 for the answer) of what a provider was sent."""
    text = str(body["messages"][-1]["content"])
    place = text.index("question 0")
    return text[place : place + len("question 000")], 2 if "[[ ## hint ## ]]\nhint" in text else 1
