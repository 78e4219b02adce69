"""Every optimizer, ended in every way: what was billed, how soon it returned, and with which program.

The truth is the provider's bill and its list of calls; the score of a program is found by asking the provider.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

import dspy

from benchmarks.compiling import Compiler, Order, result
from benchmarks.subjects import ONE_OF_EACH, THREADS, optimizers
from benchmarks.world import World

How = Literal["usd", "calls", "tokens", "time", "interrupt", "errors", "retry_after", "kill"]

WAYS: Final[tuple[How, ...]] = ("usd", "calls", "tokens", "time", "interrupt", "errors", "retry_after", "kill")

SHARE: Final = 0.30
"""Of the natural cost: the caps, and the moment at which things break."""

FULL: Final = 0.90
"""Share of a cap that has to be used where one call's bound is at most 2 % of it."""

_UNCONFIRMED: Final = ("time", "retry_after", "kill", "interrupt", "errors")
"""Ways that leave calls whose cost nobody told: the report has their bound, the bill what it was."""

SECONDS: Final = 2.0
"""The cap on time, and how long an outage may last."""


@dataclass(frozen=True)
class Natural:
    """What an optimizer uses when nothing ends it: with the first evaluation and the last, all in."""

    usd: float
    calls: int
    tokens: int


@dataclass
class Ended:
    """How one run ended.

    Attributes:
        capped: the option that caps it. cap: how much. used: of it.
        bound: the most that one call could have used of it.
        returned: seconds from what ended it (the cap's last call, the signal, the time) to the return.
        ended: the same to the end of the process. after: calls that came after the return.
        score: of the returned program. best: of the best that was completely evaluated. given: of the given program.
        broken: promises that were not kept.
    """

    optimizer: str
    how: How
    stopped_by: str = ""
    capped: str = ""
    cap: float = 0.0
    used: float = 0.0
    bound: float = 0.0
    usd: float = 0.0
    returned: float | None = None
    ended: float | None = None
    after: int = 0
    score: float | None = None
    best: float | None = None
    given: float | None = None
    broken: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def natural(compiler: Compiler, name: str, seed: int, size: int = 1) -> Natural:
    """Run one to its end, under a cap that is never reached."""
    with World(seed, **_examples(size)) as world, tempfile.TemporaryDirectory() as folder:
        order = _order(world, name, folder, {"budget_usd": 100.0}, size)
        told = compiler.run(order)
        if told.get("report", {}).get("stopped_by") != "completed":
            raise RuntimeError(f"{name} did not complete by itself: {told.get('error') or told.get('report')}")
        rows = world.provider.bill.rows
        tokens = sum(row.input_tokens + row.output_tokens for row in rows)
        return Natural(world.bill_usd, len(rows), tokens)


def end(compiler: Compiler, name: str, how: How, whole: Natural, seed: int, size: int = 1) -> Ended:
    """Have one run ended, and look at what became of it."""
    found = Ended(name, how)
    at = max(1, int(whole.calls * SHARE))
    with World(seed, **_examples(size)) as world, tempfile.TemporaryDirectory() as folder:
        options = _options(how, whole)
        found.capped = next((each for each in ("max_calls", "max_tokens", "budget_usd") if each in options), "")
        found.cap = next(
            (float(options[each]) for each in ("max_calls", "max_tokens", "budget_usd") if each in options), 0
        )
        order = _order(world, name, folder, options, size)
        if how in ("time", "errors", "retry_after"):
            world.break_from(at, {"time": "hang", "errors": "500", "retry_after": "429"}[how])  # type: ignore[arg-type]
        pid = compiler.begin(order)
        cause = _signalled(world, pid, how, at) if how in ("interrupt", "kill") else None
        compiler.wait()
        told = result(order)
        if how == "kill":
            assert cause is not None
            found.after = sum(call.received_at > cause + 0.1 for call in world.calls)
            _usage(found, world, "budget_usd", options)
            if found.usd > found.cap:
                found.broken.append(f"bill {found.usd:.6f} of {found.cap:.6f} when it was killed")
            cause = None
            again = replace(order, arguments={"resume": True})
            compiler.begin(again)
            compiler.wait()
            told = result(again)
        if not told or "error" in told:
            found.broken.append(f"no result: {told.get('error')}")
            return found
        _look(found, world, told, cause, options)
    return found


def _examples(size: int) -> dict[str, int]:
    return {"train": 40 * size, "val": 60 * size, "test": 60}


def _order(world: World, name: str, folder: str, options: dict[str, Any], size: int) -> Order:
    store = f"sqlite:///{folder}/state.db"
    given = {"name": f"{name}-{uuid.uuid4().hex[:6]}", "store": store, "view": None, **options}
    lm = {"store": store, "cache": True}
    return Order(name, world.url, f"{folder}/result.json", world.seed, _examples(size), given, {}, lm)


def _options(how: How, whole: Natural) -> dict[str, Any]:
    if how == "calls":
        return {"max_calls": max(1, int(whole.calls * SHARE))}
    if how == "tokens":
        return {"max_tokens": max(1, int(whole.tokens * SHARE))}
    if how in ("usd", "kill"):
        return {"budget_usd": whole.usd * (SHARE if how == "usd" else 2 * SHARE)}
    if how in ("time", "retry_after"):
        return {"max_time": SECONDS + 2.0}
    if how == "errors":
        return {"budget_usd": whole.usd * 2, "patience_outage": SECONDS}
    return {"budget_usd": whole.usd * 2}


def _signalled(world: World, pid: int, how: How, at: int) -> float:
    """Send the signal at the call, and say when."""
    with contextlib.suppress(TimeoutError):
        world.provider.wait_until(lambda provider: len(provider.calls) >= at, timeout=120)
    now = time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGINT if how == "interrupt" else signal.SIGKILL)
    return now


def _usage(found: Ended, world: World, dimension: str, options: dict[str, Any]) -> None:
    rows = world.provider.bill.rows
    found.usd = world.bill_usd
    accepted = [call for call in world.calls if call.accepted]
    prices = {name.partition("/")[2]: price for name, price in world.prices.items()}
    bounds = [
        (len(call.prompt.encode()), call.max_tokens or 0, prices.get(call.model.removeprefix("openai/"), (0.0, 0.0)))
        for call in accepted
    ]
    if dimension == "budget_usd":
        found.used = found.usd
        found.bound = max([(n * p[0] + m * p[1]) / 1e6 for n, m, p in bounds], default=0.0)
    elif dimension == "max_calls":
        found.used, found.bound = len(world.calls), 1
    elif dimension == "max_tokens":
        found.used = sum(row.input_tokens + row.output_tokens for row in rows)
        found.bound = max([n + m for n, m, _ in bounds], default=0)


def _look(found: Ended, world: World, told: dict[str, Any], cause: float | None, options: dict[str, Any]) -> None:
    report, returned_at, ended_at = told["report"], told["returned_at"], told["ended_at"]
    found.stopped_by = report["stopped_by"]
    calls = world.calls
    if found.how != "kill":
        found.after = sum(call.received_at > returned_at for call in calls)
    _usage(
        found, world, next((each for each in ("max_calls", "max_tokens", "budget_usd") if each in options), ""), options
    )
    if found.how in ("time", "retry_after") and found.stopped_by == "time":
        # The time runs from the run's beginning; on a busy machine imports and fingerprints before it take seconds.
        cause = min([call.received_at for call in calls], default=told["began_at"]) + options["max_time"]
    elif found.how == "errors":
        cause = next((call.received_at for call in calls if call.fault), 0.0) + options["patience_outage"]
    elif cause is None:
        cause = max([call.finished_at or call.received_at for call in calls], default=returned_at)
    found.returned, found.ended = returned_at - cause, ended_at - cause
    world.mend()
    _judge(found, report)
    _score(found, world, told, report)


def _judge(found: Ended, report: dict[str, Any]) -> None:
    expected: tuple[str, ...] = {
        "usd": ("budget",), "calls": ("calls",), "tokens": ("tokens",), "time": ("time",),
        "interrupt": ("interrupted",), "errors": ("failed",), "retry_after": ("time", "failed"),
        "kill": ("completed", "budget"),
    }[found.how]  # fmt: skip
    say = found.broken.append
    if found.how != "interrupt":
        expected = (*expected, "completed")
    if found.stopped_by not in expected:
        say(f"stopped by {found.stopped_by} ({report['detail']})")
    if found.cap and found.used > found.cap * (1 + 1e-12):
        say(f"used {found.used:g} of {found.cap:g}")
    capped = found.how in ("usd", "calls", "tokens") and found.stopped_by != "completed"
    if capped and found.bound <= 0.02 * found.cap and found.used < FULL * found.cap:
        say(f"only {found.used / found.cap:.0%} of the cap was used")
    dearest = found.bound if "budget_usd" in found.capped else 0.0
    flying = THREADS * dearest if found.how == "interrupt" else 0.0  # they are billed after the report was made
    if report["spent_usd"] < found.usd - flying - 1e-9 or (
        report["spent_usd"] > found.usd + 1e-9 and found.how not in _UNCONFIRMED
    ):
        say(f"the report says ${report['spent_usd']:.6f}, the bill ${found.usd:.6f}")
    if found.after:
        say(f"{found.after} calls after the return")
    late = 4.0 if found.how == "errors" else 1.0  # attempts and the wait between them are under way at the last moment
    if found.stopped_by == "completed" or found.how == "kill" or found.returned is None or found.ended is None:
        return  # a resumed run waits until what the killed process held has lapsed
    if found.returned > late:
        say(f"returned after {found.returned:.1f} s")
    if found.ended - max(0.0, found.returned) > 2.0:
        say(f"the process lived {found.ended - found.returned:.1f} s longer")


def _score(found: Ended, world: World, told: dict[str, Any], report: dict[str, Any]) -> None:
    """Ask the provider how good the returned program is, by the examples that candidates were chosen by."""
    lm = world.lm(plain=True, cache=True)
    subject = optimizers(world, lm=lm, prompt_lm=lm, only=found.optimizer)[found.optimizer]
    examples = subject.arguments.get("valset") or subject.arguments.get("trainset") or world.trainset
    program = subject.student.deepcopy()
    if found.optimizer != "KNNFewShot":  # its program is more than its state
        state = told["state"]
        for part in [state, *state.values()]:  # a predictor of its own keeps its LM at the top
            if isinstance(part, dict) and "lm" in part:
                part["lm"] = None
        program.load_state(state)
    with dspy.context(lm=lm):
        for each in (program, subject.student):
            each.set_lm(lm)
        found.given, found.score = (world.accuracy(each, examples) for each in (subject.student, program))
    complete = [each["score"] for each in report["candidates"] if each["status"] == "complete"]
    found.best = max(complete, default=None)
    if found.optimizer in ("LabeledFewShot", "BootstrapFewShot", "KNNFewShot") and found.stopped_by == "completed":
        return  # evaluated by nobody but us
    for what, other in (("given program", found.given), ("best complete candidate", found.best)):
        if other is not None and found.score < other - 1e-9:
            found.broken.append(f"the returned program scores {found.score:.3f}, the {what} {other:.3f}")


__all__ = ["ONE_OF_EACH", "WAYS", "Ended", "How", "Natural", "end", "natural"]
