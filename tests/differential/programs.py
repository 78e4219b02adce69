"""Programs whose signatures hold more than text, as DSPy's own types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import dspy
from dspy.experimental import Citations, Document

from tests.differential.shapes import PDF, PNG, WAV, Colour


def look(what: str) -> str:
    """Look something up."""
    return f"{what} is blue"


def _of(signature: Any, **inputs: Any) -> Callable[[], Any]:
    return lambda: dspy.Predict(signature)(**inputs)


def _typed(kind: Any, value: Any) -> Callable[[], Any]:
    """A question about something of a type."""

    class About(dspy.Signature):
        """Say what it is."""

        thing: kind = dspy.InputField()
        answer: str = dspy.OutputField()

    return lambda: dspy.Predict(About)(thing=value)


def _answering(kind: Any, **inputs: Any) -> Callable[[], Any]:
    """A question whose answer has a type."""

    class Answering(dspy.Signature):
        """Answer."""

        question: str = dspy.InputField()
        answer: kind = dspy.OutputField()

    return lambda: dspy.Predict(Answering)(question="What is the colour?", **inputs)


def _reasoned() -> Any:
    class Reasoned(dspy.Signature):
        """Answer with thought."""

        question: str = dspy.InputField()
        reasoning: dspy.Reasoning = dspy.OutputField()
        answer: str = dspy.OutputField()

    return dspy.Predict(Reasoned)(question="What is the colour?")


def _with_history() -> Any:
    class Talk(dspy.Signature):
        """Go on."""

        history: dspy.History = dspy.InputField()
        question: str = dspy.InputField()
        answer: str = dspy.OutputField()

    history = dspy.History(messages=[{"question": "Hello?", "answer": "Yes."}])
    return dspy.Predict(Talk)(history=history, question="What is the colour?")


def _with_tools() -> Any:
    class Tooled(dspy.Signature):
        """Use tools."""

        question: str = dspy.InputField()
        tools: list[dspy.Tool] = dspy.InputField()
        answer: str = dspy.OutputField()
        calls: dspy.ToolCalls = dspy.OutputField()

    return dspy.Predict(Tooled)(question="What is the colour?", tools=[dspy.Tool(look)])


def _cited() -> Any:
    class Cited(dspy.Signature):
        """Cite."""

        documents: list[Document] = dspy.InputField()
        question: str = dspy.InputField()
        answer: str = dspy.OutputField()
        citations: Citations = dspy.OutputField()

    return dspy.Predict(Cited)(documents=[Document(data="The sky is blue.", title="Sky")], question="Which colour?")


PROGRAMS: Final[dict[str, Callable[[], Any]]] = {
    "predict": _of("question -> answer", question="What is the colour?"),
    "chain of thought": lambda: dspy.ChainOfThought("question -> answer")(question="What is the colour?"),
    "many": _of("question -> answer", question="What is the colour?", config={"n": 2, "temperature": 1.0}),
    "image": _typed(dspy.Image, dspy.Image(PNG)),
    "images": _typed(list[dspy.Image], [dspy.Image(PNG), dspy.Image(PNG)]),
    "audio": _typed(dspy.Audio, dspy.Audio(data=WAV, audio_format="wav")),
    "file": _typed(dspy.File, dspy.File(file_data=PDF, filename="a.pdf")),
    "file by id": _typed(dspy.File, dspy.File(file_id="file-1")),
    "document": _typed(Document, Document(data="The sky is blue.", title="Sky")),
    "code": _typed(dspy.Code["python"], dspy.Code["python"](code="print(1)")),
    "literal": _answering(Literal["blue", "red"]),
    "schema": _answering(Colour),
    "number": _answering(int),
    "reasoning": _reasoned,
    "history": _with_history,
    "tools": _with_tools,
    "citations": _cited,
    "react": lambda: dspy.ReAct("question -> answer", tools=[look], max_iters=1)(question="What is the colour?"),
}

ADAPTERS: Final[dict[str, Callable[[], Any]]] = {
    "chat": dspy.ChatAdapter,
    "json": dspy.JSONAdapter,
    "xml": dspy.XMLAdapter,
    "chat, native tools": lambda: dspy.ChatAdapter(use_native_function_calling=True),
    "two steps": lambda: dspy.TwoStepAdapter(dspy.settings.lm),
}
