"""Keys of several names: no two lots of names have one, whatever they hold."""

from __future__ import annotations

from itertools import product

import dspy_prod
from dspy_prod.options import RateLimit
from dspy_prod.stores.keys import apart, joined
from tests.e2e.support import fresh_memory

ODD = ("a", "a|b", "b|c", "|", "", "%7C", "%", "anonymous", "%61nonymous", "\ud800", "?", None)


def test_no_two_lots_of_names_have_one_key() -> None:
    """Each comes back from its key, nobody and a user called "anonymous" included, and SQLite can hold it."""
    lots = [lot for size in (1, 2, 3) for lot in product(ODD, repeat=size)]
    keys = [joined(*lot) for lot in lots]
    assert len(set(keys)) == len(lots)
    assert [apart(key) for key in keys] == lots
    assert "".join(keys).encode()


def test_a_model_cannot_be_called_so_that_it_shares_another_s_limit() -> None:
    """An address with the sign that stands between the parts of a key made two servers share a limit and a breaker."""
    servers = [("openai/m", "http://h/v1|env|x"), ("x|env|openai/m", "http://h/v1")]
    lms = [dspy_prod.LM(model, api_base=base, store=fresh_memory(), limit=RateLimit(rpm=10)) for model, base in servers]
    first, second = (lm.pipeline.primary for lm in lms)
    assert first.limit_key != second.limit_key
    assert first.place != second.place


def test_a_semicolon_in_an_address_does_not_make_it_another_server_s_place() -> None:
    """Opening the circuit of one by hand opened that of the other, whose address began alike."""
    lms = [dspy_prod.LM("openai/m", api_base=f"http://h/v1;{name}", store=fresh_memory()) for name in "ab"]
    assert lms[0].pipeline.primary.place != lms[1].pipeline.primary.place
