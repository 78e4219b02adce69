"""What Redis keeps of experiments. Reads beside the writer, and writes through it.

An experiment is kept for 400 days after something was last written or read of its units, its audit included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from dspy_prod.privacy.visible import carried
from dspy_prod.runtime.processes import is_gone, this_process
from dspy_prod.stores.durable.mailbox import Mailbox
from dspy_prod.stores.durable.posting import Posting
from dspy_prod.stores.redis.asking import Asking, Tables, enlist, named, packed, part_of, unpacked
from dspy_prod.stores.redis.batch import Value
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.trial_reading import (
    CHECKPOINT,
    TALLY,
    arms_of,
    checkpoint_of,
    decision_text,
    decisions_of,
    ended_of,
    exposed,
    last_over,
    matured,
    seen,
    tally_of,
    trial_of,
    waiting,
    windows_text,
)
from dspy_prod.stores.redis.trial_steps import HEAD
from dspy_prod.stores.redis.trial_writing import keys_of, metric_part, touch, write_things
from dspy_prod.stores.trial_posts import GRACE, Call, Exposure, Outcome, Thing, Underway, taken
from dspy_prod.stores.trial_terms import (
    CREATED,
    PART,
    Arm,
    Checkpoint,
    Decision,
    Ended,
    Lease,
    Matured,
    Progress,
    Tally,
    Trial,
    Waiting,
    check_state,
    check_windows,
    lease_of,
    ready_before,
)

_BEHIND: Final = 10_000
"""Things kept while nothing can be written: they are written at once then, and everybody waits for that."""
_STEP: Final = 1_000
"""Units over which a mark is moved in one commit: others wait for it."""
_LEASE_KEPT: Final = 86_400
"""Seconds after its end for which a lease can still be seen."""


class RedisTrials:
    """See `Trials`.

    Args:
        mailbox: how the writer is reached. connection: where to read. now: the store's time.
    """

    def __init__(self, mailbox: Mailbox, connection: Connection, now: Callable[[], float]) -> None:
        self.now = now
        self.begin(mailbox, connection)

    def begin(self, mailbox: Mailbox, connection: Connection) -> None:
        """Go by these. Experiments keep this object for as long as they live, so it serves a forked child as well."""
        self._asking = Asking(mailbox, connection)
        self._connection = connection
        what = "exposures, calls and outcomes of experiments"
        self._post = Posting[Thing](mailbox, self._write, what, taken, _BEHIND)

    # -- experiments -------------------------------------------------------------------------------------------------
    def create(self, name: str, declaration: str, windows: Mapping[str | None, float], grace: float = GRACE) -> Trial:
        check_windows(windows, grace)
        told = [each for metric, window in windows.items() for each in (metric_part(metric), repr(float(window)))]
        head = packed(carried(declaration)), windows_text(dict(windows)), repr(float(grace)), CREATED

        def put(tables: Tables, now: float) -> int:
            key = self._connection.key
            place = tables.batch.call("trial_create", key("trial", name), *head, repr(now), *told)
            enlist(tables.batch, key("trials"), part_of(name), key("trial") + ":")
            touch(tables, self._connection, name)
            return place

        found = trial_of(name, self._asking.commit(put))
        assert found is not None
        return found

    def trial(self, name: str) -> Trial | None:
        (row,) = self._asking.read(("HMGET", self._connection.key("trial", name), *HEAD))
        return trial_of(name, row)

    def trials(self) -> list[Trial]:
        (parts,) = self._asking.read(("SMEMBERS", self._connection.key("trials")))
        names = [named(part) for part in parts]
        rows = self._asking.look([("HMGET", self._connection.key("trial", name), *HEAD) for name in names])
        found = [trial_of(name, row) for name, row in zip(names, rows, strict=True)]
        return sorted((trial for trial in found if trial is not None), key=lambda trial: trial.name)

    def change(
        self,
        name: str,
        revision: int,
        *,
        state: str | None = None,
        stage: int | None = None,
        declaration: str | None = None,
        decision: Decision | None = None,
    ) -> Trial | None:
        check_state(state)
        new = {
            "state": state,
            "stage": None if stage is None else str(stage),
            "declaration": None if declaration is None else carried(declaration),
        }
        fields = [each for field, value in new.items() if value is not None for each in (field, packed(value))]

        def change(now: float) -> Sequence[Value]:
            line = b"" if decision is None else _line(decision, now)
            return [revision, repr(now), line, *fields]

        return trial_of(name, self._commit(name, "trial_change", change))

    def remove(self, name: str) -> None:
        def put(tables: Tables, now: float) -> int:
            for key in keys_of(self._connection, name):
                tables.batch.call("UNLINK", key)
            return tables.batch.call("SREM", self._connection.key("trials"), part_of(name))

        self._asking.commit(put)

    # -- what happens to units ---------------------------------------------------------------------------------------
    def expose(self, exposure: Exposure) -> None:
        self._post(exposure)

    def call(self, call: Call) -> None:
        self._post(call)

    def outcome(self, outcome: Outcome) -> None:
        self._post(outcome)

    def underway(self, underway: Underway) -> None:
        self._post(underway)

    def seen(self, name: str, unit: str) -> str | None:
        return seen(self._asking.look, self._connection.key("trial", name), unit)

    # -- reading -----------------------------------------------------------------------------------------------------
    def counts(self, name: str) -> list[Arm]:
        (row,) = self._asking.read(("HGETALL", self._connection.key("trial", name, "arms")))
        return arms_of(_flat(row))

    def ended(self, name: str) -> list[Ended]:
        (row,) = self._asking.read(("HGETALL", self._connection.key("trial", name, "ended")))
        return ended_of(_flat(row))

    def tally(self, name: str) -> Tally:
        dropped = self._post.dropped
        (row,) = self._asking.read(("HMGET", self._connection.key("trial", name), "revision", *TALLY))
        return Tally() if row[0] is None else tally_of(row[1:], dropped)

    def matured(self, name: str, metric: str | None, after: int = 0, most: int = PART) -> list[Matured]:
        trial = self.trial(name)
        if trial is None:
            return []
        mark = self._advance(trial, metric, most)
        return matured(self._asking.look, self._connection.key("trial", name), metric, after, min(mark, after + most))

    def exposed(self, name: str, after: int = 0, most: int = PART) -> list[Matured]:
        key = self._connection.key("trial", name)
        (units,) = self._asking.read(("HGET", key, "units"))
        return exposed(self._asking.look, key, after, min(int(units or 0), after + most))

    def waiting(self, name: str) -> dict[str | None, Waiting]:
        trial = self.trial(name)
        return {} if trial is None else waiting(self._asking.look, self._connection.key("trial", name), trial)

    def _advance(self, trial: Trial, metric: str | None, most: int) -> int:
        """Move the mark of a metric over the units that need not be waited for; where it is then."""
        window, grace, key = trial.window(metric), trial.grace, self._connection.key("trial", trial.name)
        over, left, before = 0, most, 0.0
        while True:
            some = min(left, _STEP)

            def put(tables: Tables, now: float, some: int = some, over: int = over) -> int:
                nonlocal before
                before = ready_before(now, window, grace)
                moments = repr(window), repr(before), repr(now + grace)
                place = tables.batch.call("trial_advance", key, metric_part(metric), *moments, some, over, repr(now))
                touch(tables, self._connection, trial.name)
                return place

            begun, mark, ahead = self._asking.commit(put)
            left -= mark - begun
            if ahead and mark >= over:
                # Stamped by a clock that was wrong: it was exposed before those after it, and is over when one of them
                # is. That one is looked for beside the writer, for it may be far away.
                (last,) = self._asking.look([("HGET", key, "units")])
                over = last_over(self._asking.look, key, before, mark, int(last or 0))
                if over > mark and left > 0:
                    continue
            if ahead or left <= 0 or mark - begun < some:
                return int(mark)

    # -- the controller ----------------------------------------------------------------------------------------------
    def checkpoint(self, name: str) -> Checkpoint | None:
        (row,) = self._asking.look([("HMGET", self._connection.key("trial", name), *CHECKPOINT)])
        return checkpoint_of(row)

    def save(self, name: str, state: str, revision: int) -> bool:
        text = packed(carried(state))
        return bool(self._commit(name, "trial_save", lambda now: [text, revision, revision + 1, repr(now)]))

    def lease(self, name: str, holder: str, seconds: float) -> Lease:
        # Who lost his lease without knowing is held off by the revisions of what he writes (`save`, `change`).
        key, asking, process = self._connection.key("trial-lease", name), packed(holder), this_process()

        def take(gone: bytes) -> list[Any]:
            def put(tables: Tables, now: float) -> int:
                times = repr(now), repr(now + seconds)
                kept = max(1, round(seconds) + _LEASE_KEPT)
                return tables.batch.call("trial_lease", key, asking, process, *times, gone, kept)

            held: list[Any] = self._asking.commit(put)
            return held

        held = take(b"")
        if held[0] != asking and held[2] and is_gone(unpacked(held[2])):
            held = take(held[2])
        return Lease(unpacked(held[0]), float(held[1]))

    def look(self, name: str, holder: str, seconds: float) -> tuple[Lease, Progress | None]:
        unkept, lease = self._post.dropped, self.lease(lease_of(name), holder, seconds)
        if lease.holder != holder:
            return lease, None
        # The lease was taken after everything posted before: it is there.
        fields = *HEAD, *TALLY, "checkpoint_revision"
        (row,) = self._asking.look([("HMGET", self._connection.key("trial", name), *fields)])
        trial = trial_of(name, row[: len(HEAD)])
        if trial is None:
            return lease, None
        return lease, Progress(trial, tally_of(row[len(HEAD) : -1], unkept), int(row[-1] or 0))

    def release(self, name: str, holder: str) -> None:
        key, asking = self._connection.key("trial-lease", name), packed(holder)
        self._asking.post(lambda tables, _: tables.batch.call("trial_release", key, asking))

    def decisions(self, name: str) -> list[Decision]:
        (rows,) = self._asking.look([("LRANGE", self._connection.key("trial", name, "audit"), 0, -1)])
        return decisions_of(rows)

    def decide(self, name: str, decision: Decision) -> int:
        return int(self._commit(name, "trial_decide", lambda now: [_line(decision, now)]))

    # -- how ---------------------------------------------------------------------------------------------------------
    def _commit(self, name: str, step: str, arguments: Callable[[float], Sequence[Value]]) -> Any:
        """The reply of a step on an experiment, which lives on for as long as any."""

        def put(tables: Tables, now: float) -> int:
            place = tables.batch.call(step, self._connection.key("trial", name), *arguments(now))
            touch(tables, self._connection, name)
            return place

        return self._asking.commit(put)

    def _write(self, tables: Any, things: list[Thing], number: int, now: float) -> None:
        write_things(tables, self._connection, things, now)


def _line(decision: Decision, now: float) -> bytes:
    return decision_text((carried(decision.what), carried(decision.by), carried(decision.evidence)), now)


def _flat(row: Any) -> list[bytes]:
    """The fields and values of a hash one after another, as a client of either protocol has them."""
    return [each for pair in row.items() for each in pair] if isinstance(row, dict) else list(row)
