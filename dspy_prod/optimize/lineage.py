"""Where candidates come from: what they were made of, as far as the optimizer tells, and what they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dspy_prod.compat.gepa import telling
from dspy_prod.optimize.seen import Seen
from dspy_prod.optimize.supported import Traits

Texts = Mapping[str, str]
"""What GEPA knows a candidate by: instructions, or code, by name."""


class Lineage:
    """The origins of a run's candidates.

    Args:
        traits: what the optimizer makes candidates from. arguments: of its `compile`.
    """

    def __init__(self, traits: Traits, arguments: Mapping[str, Any]) -> None:
        self._traits = traits
        restrict = arguments.get("restrict")
        self._seeds = sorted(restrict) if restrict else None
        self._before: tuple[Seen, list[str]] | None = None
        self._evaluations = 0

    def restart(self) -> None:
        """Count evaluations anew: what comes is the optimizer's."""
        self._evaluations = 0

    def see(self, seen: Seen, keys: list[str], given: Seen, best: Seen | None) -> None:
        """A candidate is evaluated.

        Args:
            seen: which. keys: on which examples. given: the given program. best: the best complete one so far.
        """
        if not seen.origin:
            seen.origin = self._origin()
            seen.parents = self._parents(seen, keys, given, best)
        self._evaluations += 1
        self._before = seen, keys

    def _origin(self) -> str:
        number, seeds = self._evaluations, self._seeds
        seed = seeds[number] if seeds is not None and number < len(seeds) else number - 3
        return self._traits.origin.format(n=number + 1, seed=seed)

    def _parents(self, seen: Seen, keys: list[str], given: Seen, best: Seen | None) -> tuple[int, ...]:
        """What a new candidate was made from: the one before it on the same examples, or the best one so far."""
        grows, parent = self._traits.grows, given
        if grows == "before" and self._before is not None and self._before[1] == keys:
            parent = self._before[0]
        elif grows != "given" and best is not None:
            parent = best
        return () if parent is seen else (parent.index,)


class Told:
    """Takes from GEPA which candidates it has made others of; two, where it has merged them.

    Args:
        known: all candidates so far.
    """

    def __init__(self, known: Callable[[], Iterable[Seen]]) -> None:
        self._known = known
        self._texts: dict[int, Texts] = {}

    def candidate(self, number: int, texts: Texts) -> None:
        """GEPA has taken one into its pool, under a number of its own."""
        self._texts[number] = dict(texts)

    def made(self, texts: Texts, parents: Iterable[int | None]) -> None:
        """One was made of others, which it knows by number."""
        seen = self._seen(texts)
        found = [self._seen(self._texts[each]) for each in parents if each is not None and each in self._texts]
        of = [each.index for each in found if each is not None and each is not seen]
        if seen is not None and of and seen.index != 0:
            seen.parents = tuple(dict.fromkeys(of))

    def _seen(self, texts: Texts) -> Seen | None:
        for seen in self._known():
            mine = {**seen.state.prompts, **seen.state.sources}
            if all(mine.get(name) == text for name, text in texts.items()):
                return seen
        return None


@contextmanager
def told_by(optimizers: Iterable[Any], known: Callable[[], Iterable[Seen]]) -> Iterator[None]:
    """Have every GEPA among some optimizers tell of the parents of its candidates, until the end."""
    with telling(optimizers, lambda: Told(known)):
        yield
