"""What the provider answers: choices with text or tool calls, and the usage that goes with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from dspy_prod.testing.bill import Usage
from dspy_prod.testing.calls import CallView, text_of
from dspy_prod.testing.faults import WrongUsage
from dspy_prod.testing.schema import sample

CHARS_PER_TOKEN = 4

Answer = str | Mapping[str, Any] | Sequence[Any] | None
AnswerSource = Answer | Callable[[CallView], Answer]
UsageSource = Sequence[int] | Callable[[CallView], Sequence[int]] | None

_CHAT_FIELD = re.compile(r"`\[\[ ## (\w+) ## \]\]`(?: \(must be formatted as a valid Python ([^`]*?)\))?(?=[,. ]|$)")
_JSON_FIELD = re.compile(r"`(\w+)`(?: \(must be formatted as a valid Python ([^`]*?)\))?(?=[,.]|$)")
_CHAT_ASK = "Respond with the corresponding output fields"
_JSON_ASK = "Respond with a JSON object in the following order of fields"
_NOTE = re.compile(r"\{(\w+)\} {8}# note: the value you produce (.+)")
_PYTHON_VALUES: dict[str, Any] = {"int": 1, "float": 1.0, "bool": True}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function the model wants called; `arguments` is a JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One generated answer."""

    text: str | None
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = "stop"
    reasoning: str | None = None

    @property
    def chars(self) -> int:
        """Characters generated."""
        called = sum(len(c.name) + len(c.arguments) for c in self.tool_calls)
        return len(self.text or "") + len(self.reasoning or "") + called


@dataclass(frozen=True, slots=True)
class Reply:
    """All choices of a call and their usage."""

    call: CallView
    choices: tuple[Choice, ...]
    usage: Usage
    created: int

    def usage_at(self, share: float) -> Usage:
        """The usage when only `share` (0 to 1) of the output had been generated: all input, output rounded up."""
        if share >= 1:
            return self.usage
        output = ceil(self.usage.output_tokens * share)
        return self.usage._replace(output_tokens=output, reasoning_tokens=min(self.usage.reasoning_tokens, output))


def compose(call: CallView, answer: AnswerSource, usage: UsageSource, *, call_tools: bool, created: int) -> Reply:
    """The reply to `call`: the configured answer or a fitting default, cut at `max_tokens`, with its usage."""
    if call.api == "embeddings":
        return Reply(call, (), _read(call, usage), created)
    given = answer(call) if callable(answer) else answer
    several = isinstance(given, Sequence) and not isinstance(given, str)
    choices = []
    for position in range(call.n):
        own: Any = given[position % len(given)] if several and given else given  # type: ignore[index]
        choice = default_choice(call, position, call_tools) if own is None else as_choice(own, call, position)
        choices.append(_cut(choice, call.max_tokens))
    counted = _count(call, choices, usage)
    if call.max_tokens is not None and counted.output_tokens > call.max_tokens * call.n:
        most = max(1, call.max_tokens * call.n)
        counted = counted._replace(output_tokens=most, reasoning_tokens=min(counted.reasoning_tokens, most))
        choices = [Choice(c.text, c.tool_calls, "length", c.reasoning) for c in choices]
    return Reply(call, tuple(choices), counted, created)


def distort(usage: Usage, fault: WrongUsage) -> Usage:
    """`usage` as a provider with `fault` counts it."""
    factor = Fraction(str(fault.factor))
    inputs = ceil(usage.input_tokens * factor) if fault.input_tokens is None else fault.input_tokens
    outputs = ceil(usage.output_tokens * factor) if fault.output_tokens is None else fault.output_tokens
    return Usage(inputs, outputs, min(usage.cached_tokens, inputs), min(usage.reasoning_tokens, outputs))


def as_choice(given: Any, call: CallView, position: int) -> Choice:
    """A choice from a test's answer.

    A string is the text. A mapping with any of `content`, `tool_calls`, `reasoning` or `finish_reason` is a
    message (a tool call is `{"name": ..., "arguments": dict or JSON text}`); any other mapping is sent as JSON.
    """
    if isinstance(given, str):
        return Choice(given)
    if not isinstance(given, Mapping):
        raise TypeError(f"an answer is a string, a mapping, a list of those (one per choice) or None, not {given!r}")
    if not {"content", "tool_calls", "reasoning", "finish_reason"} & given.keys():
        return Choice(json.dumps(given))
    called = []
    for number, tool in enumerate(given.get("tool_calls") or ()):
        tool = tool.get("function", tool)
        arguments = tool.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        called.append(ToolCall(f"call_{call.index}_{position}_{number}", tool["name"], text))
    content = given.get("content")
    text_or_none = content if content is None or isinstance(content, str) else json.dumps(content)
    reason = given.get("finish_reason") or ("tool_calls" if called else "stop")
    return Choice(text_or_none, tuple(called), reason, given.get("reasoning"))


def default_choice(call: CallView, position: int = 0, call_tools: bool = False) -> Choice:
    """A plausible answer to what was asked: a tool call, JSON for a schema, the fields of a DSPy adapter, or "ok".

    Choice 0 is the plain one; text in later choices carries its number, so that no two are alike.
    """
    suffix = f" {position + 1}" if position else ""
    tool = _tool_to_call(call, call_tools)
    if tool is not None:
        arguments = sample(tool.get("parameters") or {"type": "object"}, suffix=suffix)
        return as_choice({"tool_calls": [{"name": tool["name"], "arguments": arguments}]}, call, position)
    wanted = call.response_format
    if wanted["schema"] is not None:
        return Choice(json.dumps(sample(wanted["schema"], suffix=suffix)))
    last = call.last_message
    if _CHAT_ASK in last:
        asked = last[last.rindex(_CHAT_ASK) :]
        values = _fields(_CHAT_FIELD, asked, call, suffix)
        values.pop("completed", None)
        parts = [f"[[ ## {name} ## ]]\n{v if isinstance(v, str) else _python(v)}" for name, v in values.items()]
        return Choice("\n\n".join([*parts, "[[ ## completed ## ]]"]))
    if _JSON_ASK in last:
        return Choice(json.dumps(_fields(_JSON_FIELD, last[last.rindex(_JSON_ASK) :], call, suffix)))
    if wanted["type"] == "json_object":
        return Choice(json.dumps({"answer": f"ok{suffix}"}))
    return Choice(f"ok{suffix}")


def _tool_to_call(call: CallView, call_tools: bool) -> dict[str, Any] | None:
    tools = call.tools
    choice = call.body.get("tool_choice")
    if not tools or choice == "none":
        return None
    if isinstance(choice, dict):
        name = choice.get("name") or (choice.get("function") or {}).get("name")
        return next((tool for tool in tools if tool["name"] == name), tools[0])
    answered = bool(call.messages) and call.messages[-1].get("role") == "tool"
    return tools[0] if choice == "required" or (call_tools and not answered) else None


def _fields(pattern: re.Pattern[str], asked: str, call: CallView, suffix: str) -> dict[str, Any]:
    """A value for each output field named in `asked`, of the type that the adapter's notes or the message give."""
    notes = {name: note.strip() for name, note in _NOTE.findall(call.prompt)}
    return {name: _value(name, kind, notes.get(name), suffix) for name, kind in pattern.findall(asked)}


def _value(name: str, kind: str, note: str | None, suffix: str) -> Any:
    if note:
        note = re.sub(r'",?$', "", note)
        if '\\"' in note:  # JSONAdapter writes its notes as JSON strings
            note = str(json.loads(f'"{note}"'))
        for start in ("must be one of: ", "must exactly match (no extra characters) one of: "):
            if note.startswith(start):
                return note[len(start) :].split("; ")[0]
        if note.startswith("must adhere to the JSON schema: "):
            return sample(json.loads(note.partition(": ")[2]), name, suffix)
    if kind in _PYTHON_VALUES:
        return _PYTHON_VALUES[kind]
    literal = re.match(r"Literal\[(['\"])(.*?)\1", kind)
    if literal:
        return literal[2]
    if kind.lower().startswith(("list", "set", "tuple")):
        return [f"{name} text{suffix}"]
    if kind.lower().startswith("dict"):
        return {}
    return f"{name} text{suffix}"


def _python(value: Any) -> str:
    return str(value) if isinstance(value, (bool, int, float)) else json.dumps(value)


def _cut(choice: Choice, max_tokens: int | None) -> Choice:
    if max_tokens is None or _tokens(choice.chars) <= max_tokens:
        return choice
    room = max(0, max_tokens * CHARS_PER_TOKEN - (choice.chars - len(choice.text or "")))
    text = None if choice.text is None else choice.text[:room]
    return Choice(text, choice.tool_calls, "length", choice.reasoning)


def _tokens(chars: int) -> int:
    return max(1, chars // CHARS_PER_TOKEN)


def _read(call: CallView, usage: UsageSource) -> Usage:
    """The usage of what is read alone, a text at a time."""
    if usage is not None:
        return _count(call, [], usage)._replace(output_tokens=0, reasoning_tokens=0)
    return Usage(sum(_tokens(len(text_of(message.get("content")))) for message in call.messages), 0)


def _count(call: CallView, choices: list[Choice], usage: UsageSource) -> Usage:
    given = usage(call) if callable(usage) else usage
    if given is not None:
        counted = Usage(*given)
        if min(counted) < 0 or counted.cached_tokens > counted.input_tokens:
            raise ValueError(f"usage is (input, output[, cached, reasoning]), cached within input, not {given!r}")
        return counted
    reasoning = sum(_tokens(len(c.reasoning)) for c in choices if c.reasoning)
    output = sum(_tokens(c.chars) for c in choices)
    return Usage(_tokens(call.input_chars), output, 0, min(reasoning, output))
