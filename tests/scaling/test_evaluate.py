"""`dspy_prod.evaluate` in threads, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import ConfigError
from dspy_prod.testing import Provider
from tests.e2e.support import make_lm
from tests.scaling.programs import Fails, TwoSteps, devset, even

QUIET: dict[str, Any] = {"progress": False, "num_threads": 2}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"engine": "spark"}, "use 'threads' or 'ray'"),
        ({"workers": 2}, "num_threads="),
        ({"engine": "ray", "workers": 0}, "workers=0"),
        ({"num_threads": True}, "num_threads=True"),
        ({"devset": []}, "devset is empty"),
        ({"devset": [dspy.Example(question="a")]}, r"devset\[0\] has no inputs"),
        ({"metric": "even"}, "takes a function"),
        ({"resume": True}, "run='name'"),
        ({"run": ""}, "run=''"),
    ],
)
def test_an_impossible_argument_is_named(arguments: dict[str, Any], told: str) -> None:
    """With what to say instead."""
    given = {"devset": devset(1), "metric": even, **arguments}
    with pytest.raises(ConfigError, match=told):
        dspy_prod.evaluate(Fails(), **given)


def test_a_budget_that_could_not_hold_is_refused() -> None:
    """An LM of DSPy's own is under nobody's cap."""
    with dspy.context(lm=dspy.LM("openai/gpt-4o-mini")), pytest.raises(ConfigError, match=r"dspy_prod\.wrap"):
        dspy_prod.evaluate(TwoSteps(), devset(1), even, budget_usd=1.0)


def test_in_threads_it_is_dspy_s_evaluation_under_a_cap(tmp_path: Path) -> None:
    """The cap holds, answers are kept by name, and with more money only the rest is paid."""
    url = f"sqlite:///{tmp_path}/state.db"
    examples = devset(8)
    with Provider() as provider, dspy.context(lm=make_lm(provider.url, store=url, api_key="sk-of-the-test")):
        with pytest.raises(dspy_prod.BudgetExceededError):
            dspy_prod.evaluate(TwoSteps(), examples, even, run="nightly", budget_usd=0.0003, **QUIET)
        assert 0 < provider.bill.usd <= 0.0003
        result = dspy_prod.evaluate(TwoSteps(), examples, even, run="nightly", budget_usd=1.0, resume=True, **QUIET)
        assert (result.score, [score for *_, score in result.results]) == (50.0, [1.0, 0.0] * 4)
        assert len(provider.calls) == 2 * len(examples)
        used = dspy_prod.Run("nightly", usd=1.0, store=url, namespace="e2e").used()
        assert used.usd == pytest.approx(provider.bill.usd, abs=1e-12)

        dspy_prod.evaluate(TwoSteps(), examples[:1], even, run="nightly", resume=False, **QUIET)
        assert len(provider.calls) == 2 * len(examples) + 2
        with pytest.raises(ConfigError, match="'never' has no answers"):
            dspy_prod.evaluate(TwoSteps(), examples, even, run="never", resume=True, **QUIET)


def test_a_run_says_its_caps_itself(tmp_path: Path) -> None:
    """A run is given as it is."""
    run = dspy_prod.Run("own", usd=1.0, store=f"sqlite:///{tmp_path}/state.db")
    with pytest.raises(ConfigError, match="said by the Run itself"):
        dspy_prod.evaluate(Fails(), devset(1), even, run=run, budget_usd=1.0)
    assert dspy_prod.evaluate(Fails(), devset(2), even, run=run, **QUIET).score == 50.0
