"""What unseen work may cost: each piece knows what it was refused itself."""

from __future__ import annotations

from dspy_prod.experiments.purse import IN_A_ROW, Piece, Purse
from dspy_prod.stores.base import Refusal


def refuse(piece: Piece, amount: int, spent: int = 0, held: int = 0) -> None:
    piece.refused("usd", Refusal("budget_exceeded", None, "", 100, spent, held, amount), "m", "primary")


def test_what_a_piece_has_left_behind_tells_nothing_of_the_next_one() -> None:
    """As a thread that its program did not wait for."""
    purse = Purse("r", usd=1.0, store="memory://purse")
    left, now = Piece(purse), Piece(purse)
    refuse(left, 101)
    assert (left.has_refused, left.is_short) == (True, True)
    assert (now.has_refused, now.is_short) == (False, False)
    refuse(now, 60, held=60)
    assert (now.has_refused, now.is_short, left.is_short) == (True, False, True)
    refuse(left, 60, held=60)
    assert left.is_short, "one refusal of its calls was for what is spent"
    assert now.takes_over(purse), "they are the same run"


def test_a_purse_is_used_up_once_so_many_pieces_in_a_row_are_short_of_those_that_were_granted_something() -> None:
    purse = Purse("r", usd=1.0, store="memory://purse")

    def see(short: bool = False, paid: bool = False) -> bool:
        piece = Piece(purse)
        if paid:
            piece.granted("usd", 10)
        if short:
            refuse(piece, 101)
        purse.see(piece)
        return purse.is_used_up()

    assert purse.covers(1), "nothing is known of calls"
    assert [see(short=True) for _ in range(IN_A_ROW - 1)] == [False] * (IN_A_ROW - 1)
    assert not see(paid=True)
    assert (purse.covers(10), purse.covers(9)) == (True, False)
    assert [see(short=True) or see() for _ in range(IN_A_ROW - 1)] == [False] * (IN_A_ROW - 1)
    assert see(short=True)
