"""Runs fuzzers: one example, many of them in a process, and what violates a rule made small and kept."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from tests.fuzz.draws import Draws, by_chance, by_script, shrunk
from tests.fuzz.invariants import Violation

STEP: Final = 50
"""Examples after which progress is told."""
KEPT: Final = 3
"""Violations of one rule that a process makes small and keeps; more are only counted."""


class Fuzzer(Protocol):
    """Makes examples of one kind."""

    def ready(self) -> Any:
        """A context within which examples are made."""

    def example(self, draws: Draws) -> str:
        """Make one example: `answer`, or the name of the typed error it ended with.

        Raises:
            Violation: a rule does not hold.
        """

    def close(self) -> None:
        """Leave nothing behind."""


def _answers(litellm: bool) -> Callable[[], Fuzzer]:
    def make() -> Fuzzer:
        from tests.fuzz.answers import Answers

        return Answers(litellm)

    return make


def _states(rows: bool) -> Callable[[], Fuzzer]:
    def make() -> Fuzzer:
        from tests.fuzz.states import States

        return States(rows)

    return make


def _names() -> Fuzzer:
    from tests.fuzz.callers import Callers

    return Callers()


KINDS: Final[Mapping[str, Callable[[], Fuzzer]]] = {
    "answers, native": _answers(False),
    "answers, LiteLLM": _answers(True),
    "states": _states(False),
    "rows": _states(True),
    "names": _names,
}
"""What is fuzzed, by name."""
SHARES: Final = {"answers, native": 0.89, "answers, LiteLLM": 0.02, "states": 0.04, "rows": 0.001, "names": 0.05}
"""Of all examples; LiteLLM takes fifty times as long as the native engines."""


@dataclass
class Tally:
    """How the examples of one kind ended.

    Attributes:
        errors: typed errors by class.
        violations: by rule.
        reproducers: what was kept of them.
    """

    kind: str
    examples: int = 0
    answers: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    violations: Counter[str] = field(default_factory=Counter)
    reproducers: list[dict[str, Any]] = field(default_factory=list)
    reached: dict[Share, int] = field(default_factory=dict)

    def died(self, share: Share, code: int | None) -> None:
        """A process ended in the middle of an example, which is somewhere behind the last that was told of."""
        number = self.reached.get(share, 0)
        self.violations["alive"] += 1
        said = f"a process ended with {code}; look from example {number} of {share} on"
        self.reproducers.append({"kind": self.kind, "rule": "alive", "script": [], "said": said, "first": []})

    def add(self, other: Tally) -> None:
        """Those of another process."""
        self.examples += other.examples
        self.answers += other.answers
        self.errors += other.errors
        self.violations += other.violations
        self.reproducers += other.reproducers


@dataclass(frozen=True)
class Share:
    """What one process does."""

    kind: str
    examples: int
    seed: int


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing is logged, and no package warns of what it was given."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def offline() -> None:
    """No key or endpoint of the developer's own, and no look for prices: before DSPy and LiteLLM are imported."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    for name in [name for name in os.environ if name.upper().endswith(("_API_KEY", "_API_BASE", "_BASE_URL"))]:
        del os.environ[name]


def run(share: Share, told: Callable[[int, int], None] = lambda count, number: None) -> Tally:
    """Make the examples of a share; what violates a rule is counted, made small and kept."""
    tally = Tally(share.kind)
    fuzzer = KINDS[share.kind]()
    with quiet(), fuzzer.ready():
        for number in range(share.examples):
            draws = by_chance((share.seed << 32) + number)
            try:
                end = fuzzer.example(draws)
            except Violation as violation:
                tally.violations[violation.kind] += 1
                if tally.violations[violation.kind] <= KEPT:
                    tally.reproducers.append(reproducer(fuzzer, share.kind, draws.made, violation))
            else:
                if end == "answer":
                    tally.answers += 1
                else:
                    tally.errors[end] += 1
            tally.examples += 1
            if tally.examples % STEP == 0:
                told(STEP, number)
        fuzzer.close()
    told(tally.examples % STEP, share.examples)
    return tally


def reproducer(fuzzer: Fuzzer, kind: str, made: Sequence[int], violation: Violation) -> dict[str, Any]:
    """The least that violates the same rule, as it is saved."""

    def fails(script: Sequence[int]) -> bool:
        said = violated(fuzzer, script)
        return said is not None and said.kind == violation.kind

    script = shrunk(made, fails)
    said = violated(fuzzer, script) or violation
    return {"kind": kind, "rule": violation.kind, "script": script, "said": str(said)[:2_000], "first": list(made)}


def violated(fuzzer: Fuzzer, script: Sequence[int]) -> Violation | None:
    """Which rule an example violates, if it does."""
    try:
        fuzzer.example(by_script(script))
    except Violation as violation:
        return violation
    return None


def save(tally: Tally, folder: Path) -> list[Path]:
    """Write each reproducer to a file of its own."""
    written = []
    for number, each in enumerate(tally.reproducers):
        name = "-".join("".join(c if c.isalnum() else " " for c in f"{tally.kind} {each['rule']}").split())
        path = folder / f"{name}-{number}.json"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(each, indent=1))
        written.append(path)
    return written


def replay(path: Path) -> Violation | None:
    """Make the example of a file again."""
    saved = json.loads(path.read_text())
    fuzzer = KINDS[saved["kind"]]()
    with quiet(), fuzzer.ready():
        said = violated(fuzzer, saved["script"]) or violated(fuzzer, saved["first"])
        fuzzer.close()
    return said


def shares(examples: int, seed: int, processes: int, kinds: Sequence[str]) -> list[Share]:
    """The work of all processes, the longest first."""
    whole = sum(SHARES[kind] for kind in kinds)
    found = []
    for kind in kinds:
        number = max(1, round(examples * SHARES[kind] / whole))
        for process in range(processes):
            part = number // processes + (process < number % processes)
            if part:
                found.append(Share(kind, part, seed * 1_000 + process))
    return found


def work(share: Share, there: Any) -> None:
    """What a process of its own does: tell (examples since the last word, number of the latest), at last the tally."""
    offline()
    there.send(run(share, lambda count, number: there.send((count, number))))
