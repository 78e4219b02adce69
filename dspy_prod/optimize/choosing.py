"""Which candidate is the best: by complete evaluations of the selection set alone."""

from __future__ import annotations

from collections.abc import Sequence

from dspy_prod.optimize.camera import Camera
from dspy_prod.optimize.candidates import Candidate, Status
from dspy_prod.optimize.seen import Seen
from dspy_prod.optimize.sums import Sum, Sums
from dspy_prod.optimize.supported import Rounds


def best_of(camera: Camera, returned: Seen | None) -> Seen | None:
    """The best that is complete: of equal ones what the optimizer returned, else the first. None when none is."""
    complete = [seen for seen in camera.candidates.all if camera.is_complete(seen)]
    if not complete:
        return None
    top = max(camera.mean(seen) for seen in complete)
    best = [seen for seen in complete if camera.mean(seen) >= top]
    return returned if returned in best and returned is not None else best[0]


def finalists(camera: Camera, returned: Seen | None, baseline: float | None, rounds: Rounds | None) -> list[Seen]:
    """Who may yet turn out to be the best, the most promising first: what the optimizer returned, then by their scores.

    A mean of few answers counts for less: it is drawn towards the given program's score, as if that had been seen on
    ten more examples. Of an optimizer with rounds only those count that it would evaluate itself, had it gone on, as
    soon as there are any: it holds them for the best, and a run that does go on has their answers then.
    """
    kept = set[int]() if rounds is None else _kept(camera, rounds)
    middle = 0.5 if baseline is None else baseline

    def promise(seen: Seen) -> float:
        scores = list(seen.scores.values())
        return (sum(scores) + 10 * middle) / (len(scores) + 10)

    open_ = [
        seen for seen in camera.candidates.all
        if (seen.evaluated or seen is returned) and not camera.is_complete(seen) and seen.predicted is None
        and (not kept or seen.index in kept or seen is returned)
    ]  # fmt: skip
    return sorted(open_, key=lambda seen: (seen is not returned, -promise(seen), seen.index))


def _kept(camera: Camera, rounds: Rounds) -> set[int]:
    """The best candidates of the rounds that an optimizer comes back to; it takes the first of equal ones."""
    compared: dict[frozenset[str], list[tuple[float, int]]] = {}
    for seen in camera.candidates.all[1:]:  # without the given program, whose answers came before the first round
        first = list(seen.scores.copy().items())[: rounds.size]
        if len(first) == rounds.size:
            compared.setdefault(frozenset(key for key, _ in first), []).append((sum(s for _, s in first), -seen.index))
    return {-max(scores)[1] for number, scores in enumerate(compared.values(), 1) if number in rounds.kept}


def described(camera: Camera, sums: Sums, returned: Seen | None = None) -> tuple[Candidate, ...]:
    """Everything that was a candidate, as plain data."""
    chosen = [
        seen
        for seen in camera.candidates.all
        if seen.index == 0 or seen.evaluated or seen is returned or seen.minibatches
    ]
    places = {seen.index: place for place, seen in enumerate(chosen)}
    return tuple([_candidate(camera, seen, sums.of(seen.index), places) for seen in chosen])


def _candidate(camera: Camera, seen: Seen, sum_: Sum, places: dict[int, int]) -> Candidate:
    scores = {place: seen.scores[key] for place, key in enumerate(camera.keys) if key in seen.scores}
    complete = len(scores) == len(camera.keys)
    status: Status = "complete"
    if not complete:
        status = "raced" if seen.predicted is not None else "minibatch" if seen.minibatches else "unfinished"
    asked = sum_.answers + sum_.cached + sum_.replayed
    return Candidate(
        index=places[seen.index], key=seen.state.key, origin=seen.origin or f"state {seen.index}", status=status,
        parents=tuple([places[each] for each in seen.parents if each in places]),
        score=camera.mean(seen) if complete else None,
        predicted=None if complete else seen.predicted,
        examples=len(scores), scores=scores, cost_usd=sum_.usd,
        usd_per_answer=_per_answer(sum_, asked, seen.calls), tokens=sum_.tokens,
        latency=sum_.seconds / sum_.answers * asked / seen.calls if sum_.answers and seen.calls else None,
        prompts=seen.state.prompts, demos=seen.state.demos, state=seen.state.described, found_usd=seen.found_usd,
        minibatches=tuple(seen.minibatches),
    )  # fmt: skip


def _per_answer(sum_: Sum, asked: int, calls: int) -> float | None:
    """What an answer of the program costs when nothing is cached; what failed is no part of it."""
    if not sum_.answers or not calls:
        return None
    return sum_.usd / sum_.answers * asked / calls


def mean(scores: Sequence[float]) -> float | None:
    """Of scores, None when there are none."""
    return sum(scores) / len(scores) if scores else None
