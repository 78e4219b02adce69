"""What the built-in rules of `Redactor` find, what they leave alone, and how long they take."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dspy_prod import Redactor
from dspy_prod.privacy.numbers import luhn
from tests.privacy.cases import FOUND, KEPT

REDACTOR = Redactor()
CASES = [(kind, text) for kind, texts in FOUND.items() for text in texts]


# -- the built-in rules ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "text"), CASES)
def test_a_rule_finds_its_kind(kind: str, text: str) -> None:
    """Each is found by its own rule alone, and by all rules together as the same kind."""
    token = f"<{kind}>"
    assert token in Redactor(rules=[kind]).text(text)
    clean = REDACTOR.text(text)
    assert token in clean
    assert REDACTOR.text(clean) == clean
    assert re.fullmatch(rf"{kind}-[0-9a-f]{{12}}", REDACTOR.identity(text))


@pytest.mark.parametrize("text", KEPT)
def test_what_only_looks_like_it_is_left_alone(text: str) -> None:
    """Dates, addresses, versions, order numbers and prose come back as the same object, alone and in a sentence."""
    assert REDACTOR.text(text) is text
    sentence = f"On Monday: {text} (see above)."
    assert REDACTOR.text(sentence) == sentence
    assert REDACTOR.identity(text) is text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (
            "Mail bob@example.com or call +49 30 1234567. Card: 4111 1111 1111 1111!",
            "Mail <email> or call <phone>. Card: <card>!",
        ),
        ("<bob@example.com>, 'al@example.com'", "<<email>>, '<email>'"),
        ("https://x.org/?email=bob@example.com&a=1", "https://x.org/?email=<email>&a=1"),
        ("postgres://bob:pw@host/db", "postgres://<secret>@host/db"),
        ('{"password": "a b", "user": "x"}', '{"password": "<secret>", "user": "x"}'),
        (r"{\"password\": \"a b\", \"user\": \"x\"}", r"{\"password\": \"<secret>\", \"user\": \"x\"}"),
        ("Authorization: Bearer abc12345xyz\nHost: x", "Authorization: Bearer <secret>\nHost: x"),
        ("(api_key=abcdef) done", "(api_key=<secret>) done"),
        ("a\n-----BEGIN EC PRIVATE KEY-----\nMHc\n-----END EC PRIVATE KEY-----\nb", "a\n<secret>\nb"),
        ("password=bob@example.com!1 and more", "password=<secret> and more"),
        ("on 030 1234567 2024-01-15", "on <phone> 2024-01-15"),
        ("DE89 3704 0044 0532 0130 00 BIC X", "<iban> BIC X"),
    ],
)
def test_what_stands_around_it_is_kept(text: str, clean: str) -> None:
    """A redacted text still reads: only the thing itself is replaced."""
    assert REDACTOR.text(text) == clean


def test_rules_can_be_chosen() -> None:
    """Only the named rules apply."""
    text = "bob@example.com +49 30 1234567"
    assert Redactor(rules=("phone",)).text(text) == "bob@example.com <phone>"
    assert Redactor(rules=()).text(text) is text


# -- properties ------------------------------------------------------------------------------------------------------
FRAGMENTS = st.sampled_from(
    [text for texts in FOUND.values() for text in texts]
    + [
        "password",
        "token",
        "api key",
        "is",
        "=",
        ":",
        "@",
        ".",
        " ",
        "-",
        "/",
        "(",
        ")",
        "+",
        '"',
        "'",
        "\\",
        "\n",
        "<",
    ]
    + [
        "030",
        "1234567",
        "4111",
        "DE89",
        "sk-",
        "<email>",
        "<secret>",
        "TCK-7",
        "2024-01-15",
        "phone",
        "é",
        "0",
        "\u0130",
    ]
)
WORDS = st.text(alphabet="abcxyz éßŁ.,!?\n", max_size=12)


@settings(deadline=None, max_examples=400)
@given(st.lists(FRAGMENTS, max_size=12).map("".join) | st.text())
def test_twice_is_the_same_as_once(text: str) -> None:
    """Tokens are never found again, whatever stands around them."""
    redactor = Redactor(patterns={"ticket": r"TCK-\d+", "word": r"[a-z]+"})
    for each in (REDACTOR, redactor):
        clean = each.text(text)
        assert each.text(clean) == clean
        name = each.identity(text)
        assert each.identity(name) == name


@settings(deadline=None, max_examples=400)
@given(
    st.lists(st.integers(0, 9), min_size=15, max_size=15),
    st.lists(st.sampled_from(["", "", "", " ", "-", " - ", "\u00a0", "–"]), min_size=15, max_size=15),
    WORDS,
    WORDS,
)
@example([4] + [1] * 14, [" "] * 15, "card ", "")
def test_no_card_number_survives_in_any_formatting(digits: list[int], gaps: list[str], before: str, after: str) -> None:
    """Sixteen digits with the right check digit are found, however spaced."""
    check = next(last for last in range(10) if luhn([*digits, last]))
    number = "".join(str(digit) + gap for digit, gap in zip(digits, gaps, strict=True)) + str(check)
    clean = REDACTOR.text(f"{before}{number}{after}")
    assert number not in clean
    assert not re.search(r"\d", clean)


@settings(deadline=None, max_examples=400)
@given(st.emails(), WORDS, WORDS)
@example("jörg+tag@bücher.example", "(", ")")
def test_no_email_address_survives(email: str, before: str, after: str) -> None:
    """Every address that RFC 5322 allows is found, in the middle of words too."""
    assert email not in REDACTOR.text(f"{before} {email} {after}")
    assert email not in REDACTOR.text(f"{before}{email}{after}")
    assert REDACTOR.identity(email) != email


@settings(deadline=None)
@given(st.lists(st.emails(), unique=True, max_size=20))
def test_pseudonyms_are_stable_and_distinct(emails: list[str]) -> None:
    """One user stays one user, and two stay two."""
    names = [REDACTOR.identity(email) for email in emails]
    assert len(set(names)) == len(emails)
    assert [Redactor().identity(email) for email in emails] == names
    assert all(REDACTOR.text(name) == name for name in names)


@pytest.mark.parametrize(
    "unit",
    ["a", "a@", "a.", "@a.", "a@b.cc ", "1", "1 ", "1-", "11 ", "4111 1111 1111 1111 ", "12345678 ", "030 ", "(030) ",
     "+1 ", "DE12 ", "DE89 3704 ", "sk-", "sk-proj-", "eyJ", "eyJ-", "eyJaaaaaaaa.", "password=", 'password="',
     "password=\\", "password is ", "token=a", "bearer ", "://", "://a:", "://a:b@", "-----BEGIN ",
     "-----BEGIN PRIVATE KEY-----", "cookie: a=", "%40", "a%40", '"@', "phone 1", "10.0.0.1 ", "01.02.24 ", "\\",
     "\u0130"],
)  # fmt: skip
def test_the_time_grows_with_the_text_and_not_faster(unit: str) -> None:
    """Ten times the text takes about ten times as long, also for texts made to be slow; a square would be 100."""

    def spent(size: int) -> float:
        text = (unit * (size // len(unit) + 1))[:size]
        began = time.process_time()
        REDACTOR.text(text)
        return time.process_time() - began

    small = max(min(spent(8_000) for _ in range(3)), 1e-4)
    assert min(spent(80_000) for _ in range(2)) / small < 40
