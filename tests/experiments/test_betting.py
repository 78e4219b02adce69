"""Every bet is fair: under its hypothesis, the expectation of what a unit multiplies the wealth by is 1, or less."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_prod.experiments.betting import (
    LARGEST,
    WEIGHTS,
    ArmBet,
    Bet,
    Claim,
    LinearBet,
    ProofBet,
    ratio_gain,
    spread_gain,
    stakes,
)
from dspy_prod.experiments.comparing import Comparison
from dspy_prod.experiments.kinds import compared
from dspy_prod.options.metrics import Metric, cost, error_rate, latency

shares = st.floats(1e-4, 1 - 1e-4)
unit = st.floats(0, 1)
METRICS = [
    Metric("score", margin=0.03),
    Metric("wrong", direction="lower"),
    Metric("rating", bounds=(0, 5), margin=0.2),
    error_rate(),
    cost(missing="exclude"),
    cost(cap=2.0),
    Metric("income", relative=True, margin=0.1),
    latency(),
]


@st.composite
def outcomes(draw: st.DrawFn, most: float = 1.0) -> list[tuple[float, float]]:
    """A distribution on a few points: (probability, value)."""
    many = draw(st.integers(1, 4))
    weights = [draw(st.floats(0.01, 1)) for _ in range(many)]
    return [(weight / sum(weights), most * draw(unit)) for weight in weights]


def mean(distribution: list[tuple[float, float]]) -> float:
    return sum(chance * value for chance, value in distribution)


def told(metric: Metric, past: list[tuple[bool, float, float]]) -> Comparison:
    comparison = compared(metric)
    for candidate, propensity, value in past:
        comparison.unit(candidate, propensity, value)
    return comparison


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_equal_variants_are_a_game_that_is_fair_or_worse_for_the_bettor(metric: Metric, data: st.DataObject) -> None:
    """For any propensity, any past and any distribution; exactly fair where there is no margin. That a candidate is no
    worse is true here: that claim is bound by the expectations of its gains, below."""
    most = 1.0 if not metric.relative and metric.tail is None else 20.0
    most = metric.bounds[1] if most == 1.0 else most
    past = data.draw(st.lists(st.tuples(st.booleans(), shares, unit.map(lambda each: each * most)), max_size=30))
    long = [(place % 3 == 0, 0.3, most * (place % 7) / 7) for place in range(data.draw(st.sampled_from([0, 0, 90])))]
    if metric.tail is not None:
        long *= 4
    propensity, drawn = data.draw(shares), data.draw(outcomes(most))
    before = told(metric, [*long, *past])
    state = before.state()
    expected = {name: [0.0] * len(claim.bets) for name, claim in before.claims.items()}
    for chance, value in drawn:
        for candidate, part in ((True, propensity), (False, 1 - propensity)):
            after = compared(metric)
            after.restore(state)
            after.unit(candidate, propensity, value)
            for name, claim in after.claims.items():
                for place, bet in enumerate(claim.bets):
                    expected[name][place] += chance * part * bet.wealth
    for name, claim in before.claims.items():
        if name == "no_worse":
            continue
        for bet, wealth in zip(claim.bets, expected[name], strict=True):
            assert wealth <= bet.wealth * (1 + 1e-9)
            fair = metric.margin is None or name == "better" or name.endswith("answers")
            if fair or (name == "worse" and metric.role == "success" and isinstance(bet, ArmBet)):
                assert wealth == pytest.approx(bet.wealth, rel=1e-9)


@given(propensity=shares, low=outcomes(), up=st.lists(unit, min_size=4, max_size=4), expected=unit)
def test_a_stochastically_smaller_candidate_is_never_bet_on_with_profit(
    propensity: float, low: list[tuple[float, float]], up: list[float], expected: float
) -> None:
    """The candidate has `low`, control the same with each outcome moved up: every theta loses on average."""
    high = [(chance, value + (1 - value) * each) for (chance, value), each in zip(low, up, strict=False)]
    wealth = [0.0] * len(WEIGHTS)
    for candidate, part, distribution in ((True, propensity, low), (False, 1 - propensity, high)):
        for chance, value in distribution:
            bet = ArmBet()
            bet.bet(candidate, propensity, value - expected)
            wealth = [sofar + part * chance * each for sofar, each in zip(wealth, bet.wealths, strict=True)]
    assert all(each <= begin * (1 + 1e-9) for each, begin in zip(wealth, WEIGHTS, strict=True))


@given(propensity=shares, ours=outcomes(), theirs=outcomes(), expected=unit, margin=st.floats(0, 0.9))
def test_gains_have_the_expectation_that_they_are_said_to_have(
    propensity: float,
    ours: list[tuple[float, float]],
    theirs: list[tuple[float, float]],
    expected: float,
    margin: float,
) -> None:
    """The difference of means against a margin, and the means against a ratio, whatever is expected of a unit."""
    spread = ratio = 0.0
    for candidate, part, drawn in ((True, propensity, ours), (False, 1 - propensity, theirs)):
        for chance, value in drawn:
            spread += part * chance * spread_gain(candidate, propensity, value, expected, margin)
            ratio += part * chance * ratio_gain(candidate, propensity, value, expected, 1 + margin)
    both = propensity * (1 - propensity)
    assert spread == pytest.approx(both * (mean(ours) - mean(theirs) + margin), abs=1e-12)
    assert ratio == pytest.approx(both * (mean(ours) - (1 + margin) * mean(theirs)), abs=1e-12)


@given(gain=st.floats(-1, 50), worst=st.floats(-1, -1e-3), natural=st.floats(0, 1e3))
def test_no_stake_can_lose_everything(gain: float, worst: float, natural: float) -> None:
    """Wealth stays over 0, so that no unlucky start is final; and it stays finite."""
    bet = LinearBet()
    for _ in range(60):
        bet.bet(max(gain, worst), worst, natural)
    assert all(0 < each <= LARGEST for each in bet.wealths)
    assert max(stakes(natural, -1 / worst)) * -worst <= 0.9 + 1e-12


@pytest.mark.parametrize("kind", [ArmBet, LinearBet, ProofBet])
def test_money_is_spread_and_adds_up_to_one(kind: type[Bet]) -> None:
    """What a bet begins with is the 1 that Ville's inequality is about."""
    assert kind().wealth == pytest.approx(1, abs=1e-12)
    assert min(kind.begin) > 0


def test_a_claim_keeps_the_most_it_ever_had() -> None:
    """A bound that was crossed stays crossed, though money is lost again."""
    bet = ArmBet()
    claim = Claim(bet)
    for _ in range(20):
        bet.bet(True, 0.5, 1.0)
        claim.settle()
    most = claim.peak
    assert most > 100
    for _ in range(40):
        bet.bet(False, 0.5, 1.0)
        claim.settle()
    assert claim.wealth < 1 < claim.peak == most


def test_a_checkpoint_of_other_bets_is_refused() -> None:
    """A release with other stakes replays what is stored."""
    with pytest.raises(ValueError, match="replay"):
        Claim(ArmBet()).restore(Claim(LinearBet()).state())
