"""Upper bounds on the tokens of a request, in sub-microsecond arithmetic instead of a tokenizer.

Every token of a byte-level BPE, and of SentencePiece with byte fallback, covers at least one byte of UTF-8, so a
text never has more tokens than bytes. What providers add around the text (chat templates, tool and schema preambles,
hidden system prompts) is covered by the constants below. A hard budget reserves these bounds and settles with the usage
the provider tells.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from json.encoder import encode_basestring_ascii as _as_json_string
from typing import TYPE_CHECKING, Any

import orjson

from dspy_prod.pricing.media import media_tokens

if TYPE_CHECKING:
    from dspy.lm15 import Request

PER_REQUEST = 128
"""Tokens around a whole prompt: start and generation marks, and a template's default system prompt (Llama 3.1 about
30, Qwen 25, gpt-oss about 80; OpenAI and Anthropic under 10)."""
PER_HIDDEN_PROMPT = 1024
"""Tokens of a prompt of the provider's own, billed with the user's: xAI's Grok, by users' reports several hundred."""
PER_MESSAGE = 8
"""Tokens of a message's role and separators (OpenAI 3 to 4, Llama 5)."""
PER_PART = 4
"""Tokens where two texts of a message meet (a separator, SentencePiece's leading space)."""
PER_TEXT = 16
"""Tokens around a text that is asked a vector of: start and end marks, and the prefix of what it is for (E5's
"query: ", Cohere's and Google's `input_type`)."""
PER_MEDIA = 64
"""Tokens around a picture, a recording or a file: marks, its name, time stamps."""
PER_NAME = 64
"""Tokens of a tool's name, at most, where Gemini repeats it with the result and the request does not."""
PER_TOOL = 32
"""Tokens around one tool definition or one schema."""
PER_TOOLS = 1024
"""Tokens of the preamble that enables tools or a schema (Anthropic bills up to 530 for Claude 3 and more since)."""

# Extensions by which the server adds input that the request does not show.
_SERVER_STATE = frozenset(
    ("previous_response_id", "conversation", "prompt", "cachedContent", "cached_content", "container")
)
# Extensions that switch on something billed apart from tokens, or at another price list.
_FEES = frozenset(
    ("web_search_options", "search_parameters", "plugins", "mcp_servers", "tools", "speed", "inference_geo")
)
_MODELS = frozenset(("model", "models"))
# Anthropic's older models think beyond `max_tokens`: the wire limit is thinking budget + max_tokens
# (`dspy/_vendor/lm15/providers/anthropic.py`, `EFFORT_THINKING_BUDGETS`).
_THINKING = {"off": 0, "minimal": 1024, "low": 2048, "medium": 8192, "high": 16384, "xhigh": 24576, "max": 32768}
_COPIES = ("n", "best_of", "candidateCount", "candidate_count")
_EXPONENT = re.compile(rb"e(?<=\de)-?\d")  # of a number; some write one character more of it
_OUTPUT_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "maxOutputTokens")


def _bytes(text: str) -> int:
    """Bytes a tokenizer may see of a text: those of its UTF-8, or of its NFKC form where that is longer.

    Some tokenizers normalize first (Claude 2: NFKC), by which one character can become eighteen (U+FDFA).
    """
    if text.isascii():
        return len(text)
    size = len(text.encode("utf-8", "surrogatepass"))
    if not unicodedata.is_normalized("NFKC", text):
        size = max(size, len(unicodedata.normalize("NFKC", text).encode("utf-8", "surrogatepass")))
    return size


def _json(value: Any) -> int:
    """Bytes of a JSON value in its longest usual rendering.

    Spaces after separators; non-ASCII, and DEL as the standard library does, escaped or not; 1e16 written as 1e+16.
    """
    try:
        data = orjson.dumps(value)
        if data.isascii():
            longer = data.count(b",") + data.count(b":") + 5 * data.count(b"\x7f") + len(_EXPONENT.findall(data))
            return len(data) + longer
    except orjson.JSONEncodeError:
        pass  # integers over 64 bits, lone surrogates: the standard library takes them
    return max(len(json.dumps(value)), _bytes(json.dumps(value, ensure_ascii=False)))


def _quoted(text: str) -> int:
    """Bytes of a text that a template may show as a JSON string."""
    return max(len(_as_json_string(text)), _bytes(text))


def hosted_fees(request: Request) -> bool:
    """Whether the request switches on something billed apart from its tokens: hosted tools, searches, fast modes."""
    if any(tool.type == "builtin" for tool in request.tools):
        return True
    extensions = request.config.extensions
    return extensions is not None and not (_FEES.isdisjoint(extensions) and _MODELS.isdisjoint(extensions))


def _parts(parts: Iterable[Any], model: str) -> int | None:
    """Bytes and overhead of the parts of a message; None when one holds media that no rule bounds."""
    total = 0
    for part in parts:
        kind = part.type
        total += PER_PART
        if part.continuation:  # replayed to the provider: signatures, encrypted reasoning
            total += sum(_json(state.data) for state in part.continuation)
        if kind == "text" or kind == "thinking" or kind == "refusal":
            total += _bytes(part.text)
        elif kind == "tool_call":
            # Arguments may be shown as JSON within a JSON string, which escapes quotes and backslashes once more.
            arguments = json.dumps(part.input)
            escapes = arguments.count('"') + arguments.count("\\")
            total += PER_MESSAGE + _quoted(part.id) + _quoted(part.name) + _json(part.input) + escapes
        elif kind == "tool_result":
            content = _parts(part.content, model)
            if content is None:
                return None
            texts = (each.text for each in part.content if each.type == "text")
            quoting = sum(_quoted(text) - _bytes(text) for text in texts)
            name = _quoted(part.name) if part.name else PER_NAME
            total += PER_MESSAGE + _quoted(part.id) + name + content + quoting
        elif kind == "data":
            total += _json(part.value)
        elif kind == "citation":
            total += sum(_bytes(text) for text in (part.url, part.title, part.text) if text)
        else:
            media = media_tokens(part, model)
            if media is None:
                return None
            total += PER_MEDIA + media
    return total


def _shown(request: Request) -> int | None:
    """Bound of everything the request shows; None when it holds input that no rule bounds or only the server knows."""
    config = request.config
    total = PER_REQUEST
    system = request.system
    if type(system) is str:
        total += PER_MESSAGE + (len(system) if system.isascii() else _bytes(system))
    elif system is not None:
        size = _parts(system, request.model)
        if size is None:
            return None
        total += PER_MESSAGE + size
    for message in request.messages:
        total += PER_MESSAGE
        parts = message.parts
        part = parts[0]
        if len(parts) == 1 and part.type == "text" and part.text.isascii() and not part.continuation:
            total += PER_PART + len(part.text)
        else:
            size = _parts(parts, request.model)
            if size is None:
                return None
            total += size
        if message.continuation:
            total += sum(_json(state.data) for state in message.continuation)
    if request.tools or config.response_format is not None:
        total += PER_TOOLS
        for tool in request.tools:
            total += PER_TOOL + _json([tool.name, tool.description, tool.parameters])
        if config.response_format is not None:
            total += PER_TOOL + _json(config.response_format)
    if config.extensions is not None:
        if not _SERVER_STATE.isdisjoint(config.extensions):
            return None
        total += _json(config.extensions)
    if config.cache is not None and config.cache.resource is not None:
        return None
    if "grok" in request.model:
        total += PER_HIDDEN_PROMPT
    return total


def input_bound(request: Request, *, max_input_tokens: int | None) -> int | None:
    """An upper bound on the input tokens a provider bills for `request`; None when there is none.

    Args:
        request: the canonical request.
        max_input_tokens: the model's context limit. It caps the bound (a provider refuses what is longer), and
            stands for what cannot be measured: context that the server keeps, and media whose length nobody tells.

    None means that a budget has to refuse the request: `max_input_tokens` is needed and unknown, or no number of
    tokens tells the bill (`hosted_fees`, and `Config.probabilities`, which sends the prompt many times, lm15 MAP-14).
    """
    if (request.tools or request.config.extensions) and hosted_fees(request):
        return None
    if request.config.probabilities in ("if_available", "required"):
        return None
    total = _shown(request)
    if total is None or (max_input_tokens is not None and max_input_tokens < total):
        return max_input_tokens
    return total


def output_bound(request: Request, *, max_output_tokens: int | None) -> int | None:
    """An upper bound on the output tokens a provider bills for `request`, reasoning included; None when there is none.

    An explicit `max_tokens` bounds the output, whatever the model's own limit is said to be: OpenAI, Gemini and
    Anthropic count reasoning within it, except that lm15 adds a thinking budget to it for Anthropic's older models.
    Without it the model's own limit, `max_output_tokens`, does.
    """
    config = request.config
    limit: int | None = config.max_tokens
    copies = 1
    extensions = config.extensions
    if extensions is not None:
        limit, copies = _extended(limit, extensions)
    if limit is None:
        limit = max_output_tokens
        return None if limit is None else limit * copies
    reasoning = config.reasoning
    if reasoning is not None and ("claude" in request.model or "anthropic" in request.model):
        limit += reasoning.thinking_budget or _THINKING[reasoning.effort]
    return limit * copies


def _extended(limit: int | None, extensions: Mapping[str, Any]) -> tuple[int | None, int]:
    """The output limit and the number of answers after provider-native settings, which go to the wire verbatim."""
    google = extensions.get("generationConfig")
    settings: dict[str, Any] = {**extensions, **(google if isinstance(google, dict) else {})}
    limits = [value for name in _OUTPUT_LIMITS if isinstance(value := settings.get(name), int)]
    if isinstance(google, dict):  # replaces the one that carries `max_tokens`
        limit = None
    copies = [value for name in _COPIES if isinstance(value := settings.get(name), int)]
    return max([limit or 0, *limits]) or None, max([1, *copies])


def text_bound(text: str, *, max_input_tokens: int | None) -> int:
    """An upper bound on the tokens a provider bills for the vector of one text.

    Args:
        max_input_tokens: the model's limit for one text, which is cut there or refused; None when it is not known.
    """
    most = PER_TEXT + _bytes(text)
    return most if max_input_tokens is None else min(most, max_input_tokens)
