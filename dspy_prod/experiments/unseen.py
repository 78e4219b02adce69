"""How a shadow stage stands: what candidates answered unseen, and what kept them from answering."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Unseen:
    """The shadow stage of a rollout, as of a look.

    Attributes:
        pairs: calls that control and the candidate have answered, by candidate. needed: of each, for the next stage.
        failed: of the pairs, those in which the candidate failed.
        refused: calls that a limit, a budget or a deadline kept from being answered; they tell nothing of a candidate.
        left_out: calls for which there was no room in the queue of this process.
        usd: dollars that candidates have spent unseen; None where `shadow_usd` is not given. cap_usd: `shadow_usd`.
        spent: whether it is used up, at least for calls as those of one candidate, which is asked nothing more.
    """

    pairs: Mapping[str, int]
    needed: int
    failed: Mapping[str, int]
    refused: Mapping[str, int]
    left_out: int = 0
    usd: float | None = None
    cap_usd: float | None = None
    spent: bool = False

    @property
    def warnings(self) -> Iterator[str]:
        """What keeps the stage from its end, in words."""
        short = [f"{name} has {count:,}" for name, count in self.pairs.items() if count < self.needed]
        if self.spent and short:
            yield (
                f"the shadow stage's budget of {self.cap_usd or 0.0:g} USD is used up before it can end: of "
                f"{self.needed:,} calls {', '.join(short)}. Stop it, and begin one with a higher shadow_usd, or with "
                "fewer shadow_calls"
            )
        for name, count in self.refused.items():
            if count > self.pairs[name]:
                yield (
                    f"{count:,} of {count + self.pairs[name]:,} unseen calls of {name} were refused by a limit, a "
                    "budget or a deadline: they tell nothing of it"
                )
