"""Where keys, tokens and passwords are in a text: by their shape, and by the name they are given to.

Every pattern is tried only where a literal part of it was found, and consumes a bounded text unless it succeeds: that
keeps the search fast, and linear for any text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from dspy_prod.privacy.spans import Span, lower

_ALONE: Final = r"(?<![A-Za-z0-9])"
_DIGIT: Final = r"(?=[A-Za-z_-]{0,48}[0-9])"

_SHAPES: Final = {
    needle: re.compile(pattern)
    for needle, pattern in (
        (  # OpenAI, Anthropic, OpenRouter, Stripe
            "sk-",
            rf"{_ALONE}sk-(?:(?:proj|svcacct|admin|ant|or|live|test|lf)-[\w-]{{8,}}"
            rf"|{_DIGIT}(?:[A-Za-z0-9]{{12,}}|[\w-]{{32,}}))",
        ),
        *(
            (f"{kind}_{mode}_", rf"{_ALONE}{kind}_{mode}_\w{{8,}}")
            for kind in ("sk", "rk", "pk")
            for mode in ("live", "test")
        ),
        *((f"gh{kind}_", rf"{_ALONE}gh{kind}_[A-Za-z0-9]{{16,}}") for kind in "pousr"),  # GitHub
        ("github_pat_", r"github_pat_\w{16,}"),
        ("glpat-", r"glpat-[\w-]{16,}"),
        ("AKIA", rf"{_ALONE}AKIA[A-Z0-9]{{12,}}"),  # AWS
        ("ASIA", rf"{_ALONE}ASIA(?=[A-Z]{{0,15}}[0-9])[A-Z0-9]{{16}}(?![A-Za-z0-9])"),
        ("AIza", rf"{_ALONE}AIza[\w-]{{24,}}"),  # Google
        ("ya29.", r"ya29\.[\w-]{16,}"),
        ("xox", rf"{_ALONE}xox[a-z]-[A-Za-z0-9-]{{8,}}"),  # Slack
        ("xapp-", rf"{_ALONE}xapp-[A-Za-z0-9-]{{8,}}"),
        ("hf_", rf"{_ALONE}hf_[A-Za-z0-9]{{16,}}"),  # Hugging Face
        ("gsk_", rf"{_ALONE}gsk_[A-Za-z0-9]{{16,}}"),
        ("xai-", rf"{_ALONE}xai-[A-Za-z0-9]{{16,}}"),
        ("pplx-", rf"{_ALONE}pplx-[A-Za-z0-9]{{16,}}"),
        ("nvapi-", rf"{_ALONE}nvapi-[\w-]{{16,}}"),
        ("npm_", rf"{_ALONE}npm_[A-Za-z0-9]{{16,}}"),
        ("eyJ", r"(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?"),  # JSON Web Token
    )
}  # fmt: skip

_AWS_SECRET: Final = re.compile(r"[A-Za-z0-9/+]{40,}")
_USERINFO: Final = re.compile(r"://(?P<pair>[^\s/?#\"'<>@:]{0,128}:[^\s/?#\"'<>]{1,256})@")
_PEM: Final = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_PEM_END: Final = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_BEARER: Final = re.compile(
    r"(?<![a-z])bearer\s{1,4}(?P<hit>(?=[a-z._~+/=-]{0,64}[0-9])[\w.~+/=-]{8,}|[\w.~+/=-]{24,})"
)
_QUERY: Final = re.compile(r"[?&](?:key|sig|signature|auth|token|code)=(?P<hit>[^\s&#\"'<>]{8,})")

# -- names -----------------------------------------------------------------------------------------------------------
_WORDS: Final = (
    r"(?!(?:none|null|nil|true|false|undefined|required|missing|invalid|optional|unset|empty|wrong|incorrect|expired|str"
    r"|string|int|bytes|must|should|is|are|not|the|your|my|an?|and|or|to|see|of|in|for|with|from)(?![^\W_]|-\w))"
)
"""Words that are said about a secret, and are none."""

_IS: Final = r"[\"'\\]{0,4}[ \t]{0,4}(?:=>|[:=]{1,2})[ \t]{0,4}"
_QUOTED: Final = (
    r"(?:\"(?P<double>(?:[^\"\\\n]|\\.){1,4096})\"|'(?P<single>(?:[^'\\\n]|\\.){1,4096})'"
    r"|\\{1,4}[\"'](?P<escaped>[^\"'\\\n]{1,4096})\\{1,4}[\"'])"
)
_BARE: Final = r"[^\s\"',;&]"
_ESCAPE: Final = re.compile(r"(?<!\\)\\+(?:[nrt]|$)")
"""In text that is quoted inside of quotes, a value ends with an escaped line break or quote."""
_SAID: Final = (
    rf"[ \t]{{1,2}}(?:is|was|provided)[ \t:]{{1,3}}[\"']?(?P<said>(?=[^\s\"',;&0-9]{{0,64}}[0-9]){_BARE}{{4,}})"
)
_STRONG: Final = rf"(?:{_IS}(?:{_QUOTED}|{_WORDS}(?P<bare>{_BARE}{{3,}}))|{_SAID})"
"""After a name that nothing but a secret is given to: any value."""

_WEAK: Final = (
    rf"(?:{_IS}[\"'\\]{{0,4}}{_WORDS}"
    rf"(?P<bare>(?=[^\s\"',;&\\0-9]{{0,64}}[0-9]){_BARE}{{8,}}|{_BARE}{{20,}})|{_SAID})"
)
"""After a name that has other meanings too: a value with a digit in it, or a long one."""

_KEYS: Final = "|".join(
    f"(?<={word}{gap})"
    for word in ("api", "access", "private", "secret", "account", "master", "encryption", "signing")
    for gap in ("", "-", "_", " ")
)
_NAMED: Final = tuple(
    (needle, re.compile(pattern))
    for needle, pattern in (
        ("passw", rf"passw(?:or[dt]|d){_STRONG}"),
        ("passphrase", rf"passphrase{_STRONG}"),
        ("pwd", rf"(?<![a-z])pwd(?![ \t]?[:=][ \t]?/){_STRONG}"),  # not the shell's working directory
        ("key", rf"(?:{_KEYS})key{_STRONG}"),
        ("secret", rf"(?<=client[-_ ])secret{_STRONG}"),
        ("secret", rf"secret(?:[-_](?:token|id|value))?{_WEAK}"),
        ("token", rf"(?<![a-z])token{_WEAK}"),
        ("credential", rf"credentials?{_WEAK}"),
        (
            "authorization",
            rf"authorization{_IS}[\"'\\]{{0,4}}(?:(?:bearer|basic|token|digest|apikey)[ \t]{{1,4}}|{_WORDS})"
            rf"(?P<bare>{_BARE}{{4,}})",
        ),
        ("cookie", r"cookie[\"'\\]{0,4}[ \t]?:[ \t]{0,4}[\"'\\]{0,4}(?P<header>[\w.-]{1,64}=[^\r\n\"'\\]{4,4096})"),
    )
)


def secrets(text: str) -> list[Span]:
    """API keys, tokens, private keys, passwords in URLs, and what is assigned to a name such as `password`."""
    lowered = lower(text)
    spans = [span for needle, pattern in _SHAPES.items() for span in _at(needle, pattern, text)]
    spans += _pems(text)
    if "AKIA" in text or "ASIA" in text:
        spans += [match.span() for match in _AWS_SECRET.finditer(text) if _looks_random(match[0])]
    spans += _at("://", _USERINFO, text)
    spans += _at("bearer", _BEARER, lowered)
    if "=" in text:
        for mark in "?&":
            spans += _at(mark, _QUERY, lowered)
    for needle, pattern in _NAMED:
        spans += _at(needle, pattern, lowered)
    return spans


def _at(needle: str, pattern: re.Pattern[str], text: str) -> Iterator[Span]:
    at = text.find(needle)
    while at >= 0:
        match = pattern.match(text, at)
        if match is None:
            at = text.find(needle, at + 1)
        else:
            begin, end = match.span(match.lastgroup or 0)
            at = text.find(needle, end)
            if match.lastgroup in ("bare", "said", "hit"):
                escape = _ESCAPE.search(text, begin, end)
                end = end if escape is None else escape.start()
                while end > begin + 1 and text[end - 1] in ")]}":
                    end -= 1
            if begin < end:
                yield begin, end


def _pems(text: str) -> Iterator[Span]:
    at = text.find("-----BEGIN ")
    while at >= 0:
        begin = _PEM.match(text, at)
        if begin is None:
            at = text.find("-----BEGIN ", at + 1)
            continue
        end = _PEM_END.search(text, begin.end())
        yield at, len(text) if end is None else end.end()  # a key that was cut off is still a key
        at = -1 if end is None else text.find("-----BEGIN ", end.end())


def _looks_random(word: str) -> bool:
    return (
        len(word) == 40
        and any(char.isdigit() for char in word)
        and any(char.islower() for char in word)
        and any(char.isupper() for char in word)
    )
