"""Personal data and secrets, kept out of traces, logs and the ledger: `Redactor`, and the one in force.

    restore = privacy.install(Redactor(patterns={"ticket": r"TCK-\\d+"}))

While one is installed, names given to `call_context` become pseudonyms before anything sees them, and error texts in
reports, records and events are redacted. `enable_logging` redacts with or without it.

Patterns find what looks like personal data. They do not know names, addresses or what is told in plain words: give
`Redactor` patterns or a function of your own for those.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dspy_prod.errors import ConfigError
from dspy_prod.privacy.names import Walk
from dspy_prod.privacy.spans import replaced, widened

if TYPE_CHECKING:
    from dspy_prod.privacy.rules import Rule

_log = logging.getLogger("dspy_prod")

N = TypeVar("N", str, None, "str | None")

DEFAULT: Final = ("secret", "email", "iban", "card", "phone")
"""The built-in rules."""

FAILED: Final = "<redaction failed>"
"""Stands for a text that could not be redacted."""

KEY_VARIABLE: Final = "DSPY_PROD_PSEUDONYM_KEY"
"""Environment variable with the secret that pseudonyms are made with."""

_SALT: Final = b"dspy_prod:pseudonym:1"
_HEX: Final = 12
_ROUNDS: Final = 8
"""How often a text is looked at again at most: what was replaced may uncover more."""

_SHORTEST: Final = 10
"""Characters of the shortest word that a built-in rule finds something in (`tel5551234`): most names are shorter."""

_OWN: Final = "private"
"""Kind of what the user's function hides."""


class Pseudonym(str):
    """A name that a redactor gave, and nobody chose."""

    __slots__ = ()


class Redactor:
    """Replaces secrets and personal data in texts, values and names.

    Immutable, and safe to use from several threads. The time it takes grows with the length of the text, whatever the
    text is (for patterns and a function of your own: as far as theirs does).

    Args:
        rules: which of the built-in rules to apply:

            - `secret`: API keys of well-known shapes, JSON Web Tokens, bearer tokens, private keys, AWS keys, passwords
              in URLs, and what is assigned to a name such as `api_key` or `"password"`;
            - `email`: email addresses;
            - `iban`: bank account numbers whose checksum is right;
            - `card`: payment card numbers whose check digit is right;
            - `phone`: phone numbers, international and as commonly written.
        patterns: what else to find, by name: regular expressions as text or compiled, e.g. `{"ticket": r"TCK-\\d+"}`.
        function: a last step of your own: takes a text and returns it without what it knows to be private. When it
            raises, or returns something else than a text, the whole text becomes `<redaction failed>`.

    Raises:
        ConfigError: an unknown rule, or a pattern that is no regular expression; the message names it.

    Example:
        ```python
        redactor = dspy_prod.Redactor(patterns={"ticket": r"TCK-[0-9]+"})
        print(redactor.text("Ask ann@example.com about TCK-42"))  # Ask <email> about <ticket>
        ```
    """

    def __init__(
        self,
        rules: Iterable[str] = DEFAULT,
        *,
        patterns: Mapping[str, str | re.Pattern[str]] | tuple[()] = (),
        function: Callable[[str], str] | None = None,
    ) -> None:
        from dspy_prod.privacy.rules import BUILT_IN, built_in, of_patterns

        if function is not None and not callable(function):
            raise ConfigError(f"Redactor(function=...) takes a function of a text, got {type(function).__name__}")
        self._rules: tuple[Rule, ...] = built_in(rules)
        self._patterns: tuple[Rule, ...] = of_patterns(patterns)
        self._function = function
        self._arguments = (tuple(rule.kind for rule in self._rules), dict(patterns) if patterns else {}, function)
        self._failure_told = False
        kinds = "|".join(sorted({*BUILT_IN, _OWN, *map(re.escape, (rule.kind for rule in self._patterns))}))
        self._token = re.compile(rf"<(?:{kinds}|redaction failed)>")
        self._pseudonym = re.compile(rf"(?:{kinds})-[0-9a-f]{{{_HEX}}}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, self._arguments

    def __repr__(self) -> str:
        if "_arguments" not in self.__dict__:
            return "<Redactor, not built yet>"  # an error reporter asks
        rules, patterns, function = self._arguments
        more = f", patterns={sorted(patterns)}" if patterns else ""
        return f"Redactor({rules}{more}{', function=...' if function is not None else ''})"

    # -- texts -------------------------------------------------------------------------------------------------------
    def text(self, text: str) -> str:
        """The text with a token, such as `<email>`, in place of each thing found; twice is the same as once.

        A text without any comes back as the same object. Never raises.
        """
        return self._found(text)[0]

    def identity(self, name: str) -> str:
        """A name by which a user, tenant or session can be told apart, without telling who it is.

        A name that holds something to redact becomes a pseudonym such as `email-3f9a2c1b4d5e`: the kind of the first
        thing found, and a keyed SHA-256 of the whole name. It is the same in every process and after restarts, so
        budgets and costs keep counting one user as one. Other names, and pseudonyms, are returned unchanged.

        The key is the environment variable `DSPY_PROD_PSEUDONYM_KEY`. Without it a fixed one is used: then whoever has
        a pseudonym can confirm a guess, such as a list of known addresses, by computing theirs. A changed key makes
        everybody a new user.
        """
        if self._pseudonym.fullmatch(name):
            return name
        clean, kind = self._found(name)
        return name if kind is None or clean == name else self._named(kind, name)

    def claimed(self, name: str) -> str:
        """The `identity` of a name that somebody goes by.

        Whoever calls himself by what looks like a pseudonym is not the one it was given to: he gets one of his own.
        A pseudonym from a context in force, or from `identity`, stays.
        """
        if type(name) is not Pseudonym and self._pseudonym.fullmatch(name):
            return self._named(_OWN, name)
        return self.identity(name)

    def _named(self, kind: str, name: str) -> Pseudonym:
        key = os.environ.get(KEY_VARIABLE, "").encode("utf-8", "surrogateescape")
        told = name.encode("utf-8", "surrogatepass")
        digest = hmac.new(key or _SALT, b"dspy_prod\0" + told, hashlib.sha256).hexdigest()
        return Pseudonym(f"{kind}-{digest[:_HEX]}")

    def value(self, value: Any) -> Any:
        """A JSON-like value with its texts redacted, at any depth; the same object when nothing had to be changed.

        Names in mappings are redacted too, and the value of a name such as `password` or `api_key` is replaced
        whatever it is. What is no JSON is taken as its `str()`. Never raises; cycles end as `<cycle>`, and what lies
        deeper than 64 levels as `<too deep>`.
        """
        return Walk(self.text).value(value)

    # -- inside ------------------------------------------------------------------------------------------------------
    def _found(self, text: str) -> tuple[str, str | None]:
        """The clean text, and the kind of the first thing found."""
        try:
            clean, kind = self._by_rules(text)
            if self._function is None:
                return clean, kind
            own = self._function(clean)
            if not isinstance(own, str):
                raise TypeError(f"it returned {type(own).__name__} instead of str")
            if own == clean:
                return clean, kind
            return self._by_rules(own)[0], kind or _OWN
        except Exception as error:
            self._tell(error)
            return FAILED, _OWN

    def _by_rules(self, text: str) -> tuple[str, str | None]:
        first: str | None = None
        plain = len(text) < _SHORTEST and text.isalnum()
        rules = self._patterns if plain else (*self._rules, *self._patterns)
        for _ in range(_ROUNDS):
            before = text
            for kind, find in rules:
                spans = find(text)
                if not spans:
                    continue
                token = f"<{kind}>"
                clean = replaced(text, widened(spans, text, self._token), token)
                if clean != text:
                    text, first = clean, first or kind
            if text == before:
                break
        return text, first

    def _tell(self, error: Exception) -> None:
        if not self._failure_told:
            self._failure_told = True
            _log.error(  # neither the error's text nor its traceback: both may hold what was to be hidden
                "The redaction of a text failed with %s: such texts are replaced by %r as a whole. This is told once",
                type(error).__name__,
                FAILED,
            )


def _rebuilt(
    rules: tuple[str, ...], patterns: dict[str, str | re.Pattern[str]], function: Callable[[str], str] | None
) -> Redactor:
    return Redactor(rules, patterns=patterns, function=function)


@cache
def default() -> Redactor:
    """A redactor with the built-in rules.

    Example:
        ```python
        print(privacy.default().text("my key is sk-abcdefghijklmnopqrstuvwx"))
        ```
    """
    return Redactor()


# -- the one in force ------------------------------------------------------------------------------------------------
_active: Redactor | None = None
_installed: object = None
_lock = threading.Lock()


def active() -> Redactor | None:
    """The redactor in force in this process, None when there is none.

    Example:
        ```python
        print(privacy.active())  # None: nothing is hidden but secrets
        ```
    """
    return _active


def install(redactor: Redactor | None) -> Callable[[], None]:
    """Put a redactor in force in this process (None: none), from now on.

    Do it once, before the first call: names recorded earlier stay as they are, and would be other users. Child
    processes that were not forked have to do it themselves.

    Returns:
        A function that puts the one before it back in force; without effect once another one was installed since.

    Raises:
        ConfigError: something else than a `Redactor`.

    Example:
        ```python
        restore = privacy.install(dspy_prod.Redactor())
        with dspy_prod.call_context(user="ann@example.com"):  # recorded as a pseudonym
            lm("hello")
        restore()
        ```
    """
    global _active, _installed
    if redactor is not None and not isinstance(redactor, Redactor):
        raise ConfigError(f"privacy.install takes a Redactor or None, got {type(redactor).__name__}")
    mine = object()
    with _lock:
        before = (_active, _installed)
        _active, _installed = redactor, mine

    def restore() -> None:
        global _active, _installed
        with _lock:
            if _installed is mine:
                _active, _installed = before

    return restore


def known_as(name: N) -> N:
    """The name under which records of somebody are found: the redactor's `identity` while one is in force.

    Example:
        ```python
        print(privacy.known_as("ann@example.com"))  # with a redactor installed: the pseudonym that is in the ledger
        ```
    """
    redactor = _active
    return name if redactor is None or not isinstance(name, str) else redactor.identity(name)


def claimed(name: str) -> str:
    """The name under which somebody who goes by this one is counted and recorded; see `Redactor.claimed`."""
    redactor = _active
    return name if redactor is None else redactor.claimed(name)
