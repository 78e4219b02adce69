"""Who leads, who follows, who hears of what, and who leads when the leader has gone."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dspy_prod.policies.singleflight import ANSWERED, FAILED, LEADS, LEFT, WAITING, Flights, Follower, Home, home
from dspy_prod.runtime.reaper import REAPER
from tests.interrupts import interrupted


class Verdict(Exception):
    """An upstream's error."""


def following(flights: Flights, key: str = "k") -> tuple[Follower, list[int]]:
    """One more follower, and the states it was woken in."""
    follower = flights.join(key)
    assert follower is not None
    states: list[int] = []
    assert follower.attach(lambda: states.append(follower.state))
    return follower, states


def flying(followers: int = 0, key: str = "k") -> tuple[Flights, list[tuple[Follower, list[int]]]]:
    """A flight that somebody leads, and so many who follow."""
    flights = Flights()
    assert flights.join(key) is None
    return flights, [following(flights, key) for _ in range(followers)]


def closed() -> None:
    """Wakes a task of an event loop that is closed."""
    raise RuntimeError("Event loop is closed")


# -- the leader ends -------------------------------------------------------------------------------------------------
def test_the_first_of_a_key_leads_and_the_others_follow() -> None:
    flights, [(follower, states)] = flying(1)
    assert flights.join("another key") is None
    assert len(flights) == 2
    assert (follower.state, follower.value, follower.error, states) == (WAITING, None, None, [])


def test_an_answer_is_everybody_s_and_ends_the_flight() -> None:
    flights, crowd = flying(3)
    flights.join("another key")
    flights.answer("k", "the answer")
    assert [(follower.state, follower.value, states) for follower, states in crowd] == [
        (ANSWERED, "the answer", [ANSWERED])
    ] * 3
    assert len(flights) == 1
    assert flights.join("k") is None, "the next one leads a flight of its own"


def test_an_error_is_everybody_s_each_as_an_object_of_its_own() -> None:
    """A traceback belongs to one raise; what caused the error stays with each copy."""
    flights, crowd = flying(2)
    error = Verdict("down", 503)
    error.__cause__ = cause = ValueError("why")
    flights.fail("k", error)
    heard = [follower.raised() for follower, _ in crowd]
    assert [(type(each), each.args, each.__cause__) for each in heard] == [(Verdict, ("down", 503), cause)] * 2
    assert len({id(each) for each in [error, *heard]}) == 3
    assert [(follower.state, states) for follower, states in crowd] == [(FAILED, [FAILED])] * 2
    assert len(flights) == 0


@pytest.mark.parametrize("end", ["answer", "fail", "hand_over"])
def test_a_flight_that_nobody_follows_just_ends(end: str) -> None:
    flights, _ = flying()
    getattr(flights, end)("k", *([Verdict()] if end == "fail" else ["the answer"] if end == "answer" else []))
    assert len(flights) == 0
    getattr(flights, end)("k", *([Verdict()] if end == "fail" else ["the answer"] if end == "answer" else []))
    assert len(flights) == 0


class Unique(Exception):
    """Cannot be copied."""

    made = False

    def __new__(cls, *_: object) -> Unique:
        if cls.made:
            raise TypeError("there is only one")
        cls.made = True
        return super().__new__(cls)


class Turning(Exception):
    """Becomes something else when it is copied."""

    made = False

    def __new__(cls, *_: object) -> Any:
        if cls.made:
            return ValueError("not what it was")
        cls.made = True
        return super().__new__(cls)


@pytest.mark.parametrize("kind", [Unique, Turning])
def test_an_error_that_cannot_be_copied_is_shared_as_it_is(kind: type[Exception]) -> None:
    flights, [(follower, _)] = flying(1)
    error = kind()
    flights.fail("k", error)
    assert follower.raised() is error


class Wants(Exception):
    """Makes its text of what it is given, and wants more than it tells."""

    def __init__(self, code: str, where: str) -> None:
        super().__init__(f"{where} says {code}")
        self.code = code


class Grows(Exception):
    """Takes what it tells for what it is given."""

    def __init__(self, code: str) -> None:
        super().__init__(f"the gateway says {code}")


@pytest.mark.parametrize("error", [Wants("E7", "the gateway"), Grows("E7")])
def test_an_error_says_the_same_to_a_follower_whatever_its_class_makes_of_its_arguments(error: Exception) -> None:
    flights, [(follower, _)] = flying(1)
    flights.fail("k", error)
    heard = follower.raised()
    assert heard is not error
    assert (type(heard), str(heard), vars(heard)) == (type(error), "the gateway says E7", vars(error))


def test_what_is_noted_on_an_error_later_is_one_caller_s_alone() -> None:
    """A leader's caller adds a note to what was raised to it; so may a follower's."""
    flights, [(one, _), (other, _)] = flying(2)
    error = Verdict("down")
    error.__dict__["__notes__"] = ["from upstream"]
    flights.fail("k", error)
    error.__dict__["__notes__"].append("the leader's")
    first = one.raised()
    first.__dict__["__notes__"].append("the first follower's")
    assert other.raised().__dict__["__notes__"] == ["from upstream"]


def test_a_follower_s_error_has_nothing_of_where_the_leader_raised_it() -> None:
    flights, [(follower, _)] = flying(1)
    with pytest.raises(Verdict) as raised:
        raise Verdict("down")
    raised.value.__context__ = ValueError("what the leader's caller was handling")
    flights.fail("k", raised.value)
    assert (follower.raised().__traceback__, follower.raised().__context__) == (None, None)


class Asking(Exception):
    """Its class looks at the flights whenever one is made."""

    flights: Flights | None = None

    def __new__(cls, *_: object) -> Asking:
        if cls.flights is not None:
            cls.flights.following()
        return super().__new__(cls)


def test_no_error_s_class_is_asked_with_the_lock_held() -> None:
    """What it does, such as to ask the same, would wait for itself for ever."""
    flights, [(follower, _)] = flying(1)
    error = Asking()
    Asking.flights = flights
    thread = threading.Thread(target=flights.fail, args=("k", error), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert type(follower.raised()) is Asking


@pytest.mark.parametrize("end", ["answer", "fail"])
def test_an_outcome_goes_to_those_it_holds_for_and_the_others_have_a_leader_of_their_own(end: str) -> None:
    """And who comes while they are asked is one of the others."""
    flights = Flights()
    leader = Follower()
    assert flights.join("k", leader) is None
    crowd = [Follower(asks=number) for number in range(4)]
    states: dict[int, list[int]] = {}
    for follower in crowd:
        assert flights.join("k", follower) is follower
        woken = states[follower.asks] = []
        follower.attach(lambda woken=woken, follower=follower: woken.append(follower.state))  # type: ignore[misc]
    late = Follower(asks=9)

    def odd(number: int) -> bool:
        if number == 3:
            flights.join("k", late)
        return number % 2 == 1

    getattr(flights, end)("k", Verdict("down") if end == "fail" else "the answer", odd)
    told = FAILED if end == "fail" else ANSWERED
    assert [follower.state for follower in crowd] == [WAITING, told, WAITING, told]
    assert states == {0: [], 1: [told], 2: [], 3: [told]}
    assert (flights.following(), flights.lost("k", leader)) == (3, False)
    flights.hand_over("k", leader)
    assert [follower.state for follower in (*crowd, late)] == [LEADS, told, WAITING, told, WAITING]
    flights.answer("k", "another answer", lambda number: number == 9)
    assert (crowd[2].state, late.state, late.value) == (WAITING, ANSWERED, "another answer")


def test_an_outcome_for_some_leaves_what_the_leader_began_for_the_next_to_end() -> None:
    flights, [_] = flying(1)
    ended: list[str] = []
    flights.begun("k", lambda: ended.append("claim"))
    flights.answer("k", "the answer", lambda _: False)
    assert ended == []
    flights.hand_over("k")
    assert ended == ["claim"]


# -- the lead is handed over -----------------------------------------------------------------------------------------
def test_the_lead_goes_to_who_has_waited_longest_and_the_others_follow_on() -> None:
    flights, [(first, woken), (second, asleep)] = flying(2)
    flights.hand_over("k")
    assert (first.state, woken, second.state, asleep) == (LEADS, [LEADS], WAITING, [])
    third, _ = following(flights)
    flights.answer("k", "the answer")
    assert (first.state, second.state, third.state) == (LEADS, ANSWERED, ANSWERED)
    assert woken == [LEADS]


def test_the_lead_passes_over_who_can_never_go_on() -> None:
    """A task whose event loop was closed takes no lead: else everybody behind it waited for ever."""
    flights, [(gone, _), (able, states)] = flying(2)
    gone.attach(closed)
    flights.hand_over("k")
    assert (gone.state, able.state, states) == (LEFT, LEADS, [LEADS])
    assert len(flights) == 1
    flights.hand_over("k")
    assert len(flights) == 0


def test_a_follower_that_nobody_can_wake_yet_takes_the_lead_all_the_same() -> None:
    """It looks at its state before it waits."""
    flights, _ = flying()
    follower = flights.join("k")
    assert follower is not None
    flights.hand_over("k")
    assert follower.state == LEADS
    assert len(flights) == 1
    assert not follower.attach(closed), "there is nothing to wait for any more"
    assert follower.wake is closed


def test_an_answer_reaches_those_behind_one_who_cannot_be_woken() -> None:
    flights, [(gone, _), (able, states)] = flying(2)
    gone.attach(closed)
    flights.answer("k", "the answer")
    assert (gone.state, able.value, states) == (ANSWERED, "the answer", [ANSWERED])


# -- a follower leaves -----------------------------------------------------------------------------------------------
def test_who_leaves_is_neither_woken_nor_handed_the_lead() -> None:
    flights, [(first, woken), (second, _)] = flying(2)
    assert flights.leave("k", first)
    assert first.state == LEFT
    flights.hand_over("k")
    assert (first.state, woken, second.state) == (LEFT, [], LEADS)


@pytest.mark.parametrize(("end", "state"), [("answer", ANSWERED), ("hand_over", LEADS)])
def test_who_was_decided_meanwhile_cannot_leave(end: str, state: int) -> None:
    """Whoever leads by then must end the flight, and so has to know."""
    flights, [(follower, _)] = flying(1)
    getattr(flights, end)("k", *["the answer"] * (end == "answer"))
    assert not flights.leave("k", follower)
    assert follower.state == state


def test_a_verdict_does_not_reach_who_has_left() -> None:
    """Nor who is taken for one who follows still: `leave` may be interrupted in the middle."""
    flights, [(first, woken), (second, _)] = flying(2)
    first.state = LEFT
    flights.answer("k", "the answer")
    assert (first.state, woken, second.state) == (LEFT, [], ANSWERED)


def test_leaving_after_one_s_own_flight_disturbs_no_later_one() -> None:
    flights, [(late, _)] = flying(1)
    del flights._flights["k"]
    assert flights.join("k") is None
    other, states = following(flights)
    assert flights.leave("k", late)
    flights.answer("k", "the answer")
    assert (late.state, other.state, states) == (LEFT, ANSWERED, [ANSWERED])


# -- forks -----------------------------------------------------------------------------------------------------------
def test_a_forked_child_has_no_flights_and_a_lock_that_nobody_holds() -> None:
    """The threads that lead and follow are its parent's."""
    flights, _ = flying(1)
    with flights._lock:
        flights._after_fork()
        assert flights.join("k") is None
    assert len(flights) == 1


# -- the leader's event loop is closed -------------------------------------------------------------------------------
def loop_and_home() -> tuple[asyncio.AbstractEventLoop, Home]:
    """An event loop, and what a caller says that runs in it."""
    loop = asyncio.new_event_loop()

    async def there() -> Home:
        return home()

    return loop, loop.run_until_complete(there())


def test_a_thread_is_at_home_in_no_loop() -> None:
    assert home() is None


def test_a_follower_who_looks_takes_the_lead_of_one_whose_loop_is_closed() -> None:
    flights = Flights()
    loop, gone = loop_and_home()
    leader = Follower(gone)
    assert flights.join("k", leader) is None
    follower, states = following(flights)
    ended: list[int] = []
    flights.begun("k", lambda: ended.append(follower.state))
    flights.look_after("k")
    assert (states, ended, flights.lost("k", leader)) == ([], [], False)
    loop.close()
    flights.look_after("k")
    assert (states, flights.lost("k", leader)) == ([LEADS], True)
    assert ended == [WAITING], "before anybody else leads"
    other, heard = following(flights)
    flights.hand_over("k", leader)  # collected at last
    assert (other.state, heard) == (WAITING, [])
    flights.answer("k", "the answer")
    assert (follower.state, other.state, len(flights)) == (LEADS, ANSWERED, 0)


def test_whoever_comes_after_the_loop_was_closed_leads_at_once() -> None:
    flights = Flights()
    loop, gone = loop_and_home()
    leader = Follower(gone)
    assert flights.join("k", leader) is None
    ended: list[str] = []
    flights.begun("k", lambda: ended.append("began"))
    loop.close()
    follower = flights.join("k")
    assert follower is not None
    assert (follower.state, ended) == (LEADS, ["began"])


def test_what_a_flight_began_ends_with_it_once() -> None:
    """With its end, or before another one leads; a verdict's is its leader's to end."""
    flights, [(follower, _)] = flying(1)
    ended: list[str] = []
    flights.begun("k", lambda: ended.append("first"))
    flights.hand_over("k")
    assert (follower.state, ended) == (LEADS, ["first"])
    flights.begun("k", lambda: ended.append("second"))
    flights.hand_over("k")
    assert (len(flights), ended) == (0, ["first", "second"])
    for end in (lambda: flights.answer("k", "yes"), lambda: flights.fail("k", Verdict())):
        assert flights.join("k") is None
        flights.begun("k", lambda: ended.append("third"))
        end()
        flights.hand_over("k")
    assert ended == ["first", "second"]


def test_an_end_that_is_interrupted_is_done_by_the_next_who_leads_or_ends_the_flight() -> None:
    """The flight goes on, or ends, all the same."""
    flights, [(first, _), (second, _)] = flying(2)
    ended: list[str] = []

    def end() -> None:
        ended.append("tried")
        if len(ended) != 2:
            raise KeyboardInterrupt

    flights.begun("k", end)
    with pytest.raises(KeyboardInterrupt):
        flights.hand_over("k")
    assert (first.state, second.state) == (LEADS, WAITING)
    flights.begun("k", end)
    assert ended == ["tried"] * 2
    with pytest.raises(KeyboardInterrupt):
        flights.hand_over("k")
    assert second.state == LEADS
    ended.append("again")
    with pytest.raises(KeyboardInterrupt):
        flights.hand_over("k")
    assert len(flights) == 0


def test_an_end_that_is_interrupted_is_done_though_nobody_follows_or_comes_again() -> None:
    """A claim among processes stayed for the life of this one: all others waited for its answer."""
    REAPER.start()
    flights, _ = flying()
    ended: list[str] = []

    def end() -> None:
        ended.append("tried")
        if len(ended) == 1:
            raise KeyboardInterrupt

    flights.begun("k", end)
    with pytest.raises(KeyboardInterrupt):
        flights.hand_over("k")
    assert len(flights) == 0
    assert REAPER.flush(5)
    assert ended == ["tried"] * 2
    assert flights.join("k") is None
    flights.hand_over("k")
    assert ended == ["tried"] * 2, "it is done with"


def test_an_end_that_is_done_late_takes_none_from_the_next_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[Callable[[], None]] = []
    monkeypatch.setattr(REAPER, "post", late.append)
    flights, _ = flying()
    ended: list[str] = []

    def end() -> None:
        ended.append("first")
        if len(ended) == 1:
            raise KeyboardInterrupt

    flights.begun("k", end)
    with pytest.raises(KeyboardInterrupt):
        flights.hand_over("k")
    assert flights.join("k") is None
    flights.begun("k", lambda: ended.append("second"))
    assert ended == ["first"] * 2, "before another one leads"
    late.pop()()
    flights.hand_over("k")
    assert (ended, late) == (["first"] * 3 + ["second"], [])


def test_a_loop_that_nobody_has_any_more_is_gone_too() -> None:
    flights = Flights()
    loop, gone = loop_and_home()
    leader = Follower(gone)
    assert flights.join("k", leader) is None
    follower, states = following(flights)
    loop.close()
    del loop
    gc.collect()
    flights.look_after("k")
    assert (follower.state, states) == (LEADS, [LEADS])


def test_the_lead_is_not_passed_to_a_loop_that_is_closed() -> None:
    """Its task is woken without an error, and never goes on."""
    flights, _ = flying()
    loop, gone = loop_and_home()
    dead = flights.join("k", Follower(gone))
    assert dead is not None
    dead.attach(lambda: None)
    follower, states = following(flights)
    loop.close()
    flights.hand_over("k")
    assert (dead.state, follower.state, states) == (LEFT, LEADS, [LEADS])


@pytest.mark.parametrize("ending", ["answer", "fail"])
def test_who_is_interrupted_as_he_tells_his_followers_leads_on_to_those_left(ending: str) -> None:
    """Their flight was gone, so nobody looked after them."""
    flights, [_, (second, states)] = flying(2)

    def interrupt() -> None:
        raise KeyboardInterrupt

    told = flights._flights["k"][0]  # type: ignore[index]
    told.wake = interrupt
    with pytest.raises(KeyboardInterrupt):
        flights.answer("k", "the answer") if ending == "answer" else flights.fail("k", Verdict("down"))
    assert told.state == (ANSWERED if ending == "answer" else FAILED)
    assert second.state == WAITING
    flights.hand_over("k")
    assert states == [LEADS]


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------
HERE = ("policies/singleflight.py", "runtime/brief.py")


def cut_off(make: Callable[[], Callable[[], object]]) -> Iterator[Callable[[], object]]:
    """Yields what `make` makes, interrupted at each of its points, one after the other, made anew each time."""
    for point in itertools.count():
        work = make()
        if not interrupted(work, point, *HERE)[0]:
            break
        yield work
    assert point > 1


def led() -> tuple[Flights, Follower]:
    flights, leader = Flights(), Follower()
    assert flights.join("k", leader) is None
    return flights, leader


def test_who_is_interrupted_as_he_takes_the_lead_gives_it_back() -> None:
    flights, caller = Flights(), Follower()

    def make() -> Callable[[], object]:
        nonlocal flights, caller
        flights, caller = Flights(), Follower()
        return lambda: flights.join("k", caller)

    for _ in cut_off(make):
        flights.hand_over("k", caller)
        assert flights.join("k") is None, "the next one leads"
        flights.hand_over("k", caller)
        assert len(flights) == 1, "which is no business of his any more"


def test_who_is_interrupted_as_he_follows_is_passed_no_lead() -> None:
    flights, leader = led()
    caller = Follower()

    def make() -> Callable[[], object]:
        nonlocal flights, leader, caller
        (flights, leader), caller = led(), Follower()
        return lambda: flights.join("k", caller)

    for _ in cut_off(make):
        flights.hand_over("k", caller)
        behind, states = following(flights)
        assert flights.following() == 1
        flights.hand_over("k", leader)
        assert (behind.state, states, caller.state) == (LEADS, [LEADS], LEFT)


@pytest.mark.parametrize("who", ["he does it again", "a follower looks", "the next one leaves", "another one comes"])
@pytest.mark.parametrize("dead", [False, True])
def test_a_lead_is_not_lost_where_handing_it_over_is_interrupted(who: str, dead: bool) -> None:
    """The follower who was to have it stood in no line any more, and did not lead either."""
    flights, leader = led()
    crowd: list[tuple[Follower, list[int]]] = []

    def make() -> Callable[[], object]:
        nonlocal flights, leader, crowd
        flights, leader = led()
        if dead:
            following(flights)[0].attach(closed)
        crowd = [following(flights) for _ in range(2)]
        return lambda: flights.hand_over("k", leader)

    for work in cut_off(make):
        (first, woken), (second, _) = crowd
        if leader.state != LEFT:  # nothing was done yet, so only he can know
            work()
        if who == "he does it again":
            work()
        elif who == "a follower looks":
            flights.look_after("k")
        elif who == "the next one leaves":
            assert not flights.leave("k", first), "he leads"
        else:
            assert flights.join("k") is not None
        work()
        assert (first.state, second.state, set(woken)) == (LEADS, WAITING, {LEADS})
        flights.hand_over("k", first)
        assert second.state == LEADS
        flights.hand_over("k", second)
        assert len(flights) == (who == "another one comes")


def test_a_look_that_is_interrupted_is_done_by_the_next_who_looks() -> None:
    flights, crowd = flying(2)

    def make() -> Callable[[], object]:
        nonlocal flights, crowd
        loop, at_home = loop_and_home()
        flights = Flights()
        assert flights.join("k", Follower(at_home)) is None
        crowd = [following(flights) for _ in range(2)]
        loop.close()
        return lambda: flights.look_after("k")

    for _ in cut_off(make):
        flights.look_after("k")
        assert [follower.state for follower, _ in crowd] == [LEADS, WAITING]


@pytest.mark.parametrize("ending", ["answer", "fail"])
def test_who_is_interrupted_as_his_flight_ends_takes_the_lead_from_nobody(ending: str) -> None:
    flights, leader = led()
    crowd: list[tuple[Follower, list[int]]] = []

    def make() -> Callable[[], object]:
        nonlocal flights, leader, crowd
        flights, leader = led()
        crowd = [following(flights) for _ in range(2)]
        return lambda: flights.answer("k", "yes") if ending == "answer" else flights.fail("k", Verdict())

    later = 0
    for _ in cut_off(make):
        later += len(flights) == 0
        other = Follower()
        follows = flights.join("k", other) is not None
        flights.hand_over("k", leader)
        for follower in [*(follower for follower, _ in crowd), *[other] * follows]:
            if follower.state == LEADS:
                flights.hand_over("k", follower)
        assert WAITING not in [follower.state for follower, _ in crowd]
        assert flights.lost("k", other) == follows
    assert later, "where another one led by then"
