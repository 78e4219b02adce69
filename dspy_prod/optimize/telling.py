"""How far a run is, in words."""

from __future__ import annotations

from dspy_prod.optimize.candidates import Progress


def sentence(progress: Progress) -> str:
    """How far a run is, on one line.

    Example:
        "search, best 0.683 (given 0.500), $0.0123 of $0.05, 7 candidates, 3 min left"
    """
    parts = [f"ended: {progress.stopped_by}" if progress.stopped_by else progress.phase]
    if progress.waiting:
        parts.append(f"waiting for {progress.waiting}")
    if progress.best is not None and progress.best.score is not None:
        given = "" if progress.baseline is None else f" (given {progress.baseline:.3f})"
        parts.append(f"best {progress.best.score:.3f}{given}")
    cap = "" if progress.budget_usd is None else f" of ${progress.budget_usd:.4g}"
    parts.append(f"${progress.spent_usd:.4g}{cap}")
    if progress.max_calls is not None:
        parts.append(f"{progress.calls:,} of {progress.max_calls:,} calls")
    if progress.max_tokens is not None:
        parts.append(f"{progress.tokens:,} of {progress.max_tokens:,} tokens")
    count = len(progress.candidates)
    parts.append(f"{count} candidate{'' if count == 1 else 's'}")
    if progress.replayed:
        parts.append(f"{progress.replayed:,} calls replayed")
    if progress.eta is not None and progress.stopped_by is None:
        parts.append(f"{span(progress.eta)} left")
    else:
        parts.append(span(progress.seconds))
    return ", ".join(parts)


def used(progress: Progress) -> float:
    """The share of the cap that is used most, 0 to 1; all of it once the optimizer has completed."""
    if progress.stopped_by == "completed":
        return 1.0
    shares = [
        spent / cap
        for spent, cap in (
            (progress.spent_usd, progress.budget_usd), (progress.calls, progress.max_calls),
            (progress.tokens, progress.max_tokens), (progress.seconds, progress.max_time),
        )
        if cap
    ]  # fmt: skip
    return min(1.0, max(shares, default=0.0))


def span(seconds: float) -> str:
    """A time for people: "40 s", "3 min", "2.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
