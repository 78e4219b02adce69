"""What a run depends on is the same in every process while nothing changed, and another when something did."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_prod.optimize.fingerprints import PACKAGES, described, digests, function, model, plain, program
from dspy_prod.optimize.settings import settings_of
from dspy_prod.testing import Provider
from tests.e2e.support import make_lm

OPTIMIZERS = """
dspy.BootstrapFewShotWithRandomSearch(metric=metric, max_bootstrapped_demos=2, num_candidate_programs=3)
dspy.MIPROv2(metric=metric, auto="light", prompt_model=lm, task_model=lm)
dspy.GEPA(metric=feedback, auto="light", reflection_lm=lm)
dspy.SIMBA(metric=metric, prompt_model=lm)
dspy.COPRO(metric=metric, prompt_model=lm)
dspy.InferRules(metric=metric)
dspy.BootstrapFewShot(metric=metric)
dspy.LabeledFewShot(k=3)
dspy.BetterTogether(metric=metric, p=dspy.BootstrapFewShot(metric=metric), w=dspy.COPRO(metric=metric))
""".strip().splitlines()

CHILD = f"""
import json, sys
import dspy
from dspy_prod.optimize.fingerprints import described, digests

def metric(example, prediction, trace=None):
    return float(example.answer == prediction.answer)

def feedback(gold, pred, trace=None, pred_name=None, pred_trace=None):
    return 1.0

class Two(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first = dspy.ChainOfThought("question -> thought")
        self.second = dspy.Predict("thought -> answer")
        self.second.demos = [dspy.Example(thought="t", answer="a")]

    def forward(self, question):
        return self.second(thought=self.first(question=question).thought)

lm = dspy.LM("openai/m", temperature=0.5, api_key="sk-a-key-of-mine")
data = [dspy.Example(question=str(n), answer={{"b": 1, "a": [n]}}).with_inputs("question") for n in range(9)]
sets = {{"trainset": data}}
made = [{", ".join(OPTIMIZERS)}]
print(json.dumps([digests(described(each, Two(), sets, metric, {{"program": lm}})) for each in made]))
"""


def test_every_process_finds_the_same(tmp_path: Path) -> None:
    """Whatever order its sets and dicts of names have."""
    file = tmp_path / "program.py"
    file.write_text(CHILD)
    told = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        run = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=env, timeout=120)
        assert run.returncode == 0, run.stderr
        told.append(json.loads(run.stdout.splitlines()[-1]))
    assert told[0] == told[1]
    assert len({each["optimizer"] for each in told[0]}) == len(OPTIMIZERS)
    assert {each["student"] for each in told[0]} == {told[0][0]["student"]}
    assert set(told[0][0]) == {"optimizer", "student", "metric", "lms", "dataset trainset", *PACKAGES}


def metric(example: Any, prediction: Any, trace: Any = None) -> float:
    return float(example.answer == prediction.answer)


def data(size: int) -> list[dspy.Example]:
    return [dspy.Example(question=str(n), answer=str(n % 3)).with_inputs("question") for n in range(size)]


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda: dspy.BootstrapFewShotWithRandomSearch(metric=metric, num_candidate_programs=2, num_threads=2),
         {"valset": True}),
        (lambda: dspy.MIPROv2(metric=metric, auto="light", num_threads=2), {"valset": True}),
        (lambda: dspy.GEPA(metric=lambda gold, pred, trace=None, pred_name=None, pred_trace=None: 0.5,
                           max_full_evals=1, reflection_lm=dspy.settings.lm, num_threads=2), {"valset": True}),
        (lambda: dspy.BootstrapFewShot(metric=metric), {}),
        (lambda: dspy.LabeledFewShot(k=2), {}),
        (lambda: dspy.COPRO(metric=metric, breadth=2, depth=1), {"eval_kwargs": {"num_threads": 2}}),
    ],
    ids=["random search", "mipro", "gepa", "bootstrap", "labeled", "copro"],
)  # fmt: skip
def test_an_optimizer_that_has_compiled_is_still_the_same(make: Any, arguments: dict[str, Any]) -> None:
    """Compiling leaves data, programs, counts and generators of random numbers in it."""
    with Provider() as provider, dspy.context(lm=make_lm(provider.url, cache=True, max_tokens=500)):
        optimizer = make()
        before = plain(optimizer)
        more = {"valset": data(4)} if arguments.get("valset") else arguments
        optimizer.compile(dspy.Predict("question -> answer"), trainset=data(6), **more)
        assert plain(optimizer) == before


def test_settings_are_told_by_their_names() -> None:
    lm = dspy.LM("a/b")
    settings = settings_of(
        dspy.MIPROv2(metric, prompt_model=lm, task_model=lm, auto="medium", seed=3, num_threads=9, verbose=True)
    )
    assert (settings["auto"], settings["seed"]) == ("medium", 3)
    assert not {"metric", "num_threads", "verbose", "rng", "total_calls"} & set(settings)
    assert settings_of(dspy.GEPA(metric=feedback, max_metric_calls=70, reflection_lm=dspy.LM("a/b")))[
        "max_metric_calls"
    ] == 70  # fmt: skip


def feedback(gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> float:
    return 1.0


class Own(dspy.teleprompt.Teleprompter):
    """An optimizer of the user's own."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.rounds = rounds

    def compile(self, student: Any, *, trainset: Any, **_: Any) -> Any:
        self.seen = len(trainset)
        return student


@dataclass
class Made(dspy.teleprompt.Teleprompter):
    """One whose `__init__` nobody has written."""

    rounds: int

    def compile(self, student: Any, *, trainset: Any, **_: Any) -> Any:
        self.seen = len(trainset)
        return student


def test_settings_of_a_dataclass_are_its_fields() -> None:
    optimizer = Made(3)
    optimizer.compile(None, trainset=[])
    assert settings_of(optimizer) == {"rounds": 3}


def test_an_optimizer_of_ones_own_is_known_by_its_source() -> None:
    told = described(Own(3), dspy.Predict("q -> a"), {}, None, {})["optimizer"]
    assert told["class"].endswith("test_fingerprints.Own")
    assert told["settings"] == {"rounds": 3}
    assert told["source"] is not None
    assert described(dspy.COPRO(metric=metric), dspy.Predict("q -> a"), {}, None, {})["optimizer"]["source"] is None


class Plain(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.answer = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        return self.answer(question=question)


class Shouting(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.answer = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        return self.answer(question=question.upper())


def _with_demo() -> Any:
    changed = Plain()
    changed.answer.demos = [dspy.Example(question="q", answer="a")]
    return changed


def _with_config() -> Any:
    changed = Plain()
    changed.answer = dspy.Predict("question -> answer", temperature=0.9)
    return changed


def _inside() -> Any:
    changed = Plain()
    changed.answer = Shouting()
    return changed


@pytest.mark.parametrize("change", [_with_demo, _with_config, _inside, Shouting])
def test_another_program_is_another(change: Any) -> None:
    """`dump_state` alone does not tell a predictor's settings, nor what a program does with its answers."""
    assert program(change()) != program(Plain())
    assert program(Plain()) == program(Plain())
    assert program(Plain()) == program(Plain().deepcopy())


def test_an_lm_on_a_predictor_is_no_state_of_the_program() -> None:
    changed = Plain()
    changed.set_lm(dspy.LM("openai/m"))
    assert program(changed) == program(Plain())


def _at_least(threshold: float) -> Any:
    def scored(example: Any, prediction: Any, trace: Any = None) -> float:
        return float(len(prediction.answer) >= threshold)

    return scored


class Judge:
    def __init__(self, strictness: int, api_key: str) -> None:
        self.strictness = strictness
        self.api_key = api_key

    def __call__(self, example: Any, prediction: Any, trace: Any = None) -> float:
        return 1.0

    def score(self, example: Any, prediction: Any, trace: Any = None) -> float:
        return 0.0


def _wrapped() -> Any:
    @functools.wraps(metric)
    def outer(*arguments: Any, **named: Any) -> Any:
        return metric(*arguments, **named)

    return outer


METRICS: list[tuple[Any, Any, bool]] = [
    (metric, metric, True),
    (metric, feedback, False),
    (_at_least(3), _at_least(3), True),
    (_at_least(3), _at_least(4), False),
    (functools.partial(metric, trace=1), functools.partial(metric, trace=1), True),
    (functools.partial(metric, trace=1), functools.partial(metric, trace=2), False),
    (Judge(1, "a"), Judge(1, "b"), True),
    (Judge(1, "a"), Judge(2, "a"), False),
    (Judge(1, "a").score, Judge(2, "a").score, False),
    (Judge(1, "a").score, Judge(1, "a"), False),
    (metric, _wrapped(), True),
    (lambda e, p, t=None: 1.0, lambda e, p, t=None: 2.0, False),
    (lambda e, p, t=None: len(p), lambda e, p, t=None: len(p), True),
    (lambda e, p, t=None: [x - 1 for x in p], lambda e, p, t=None: [x + 1 for x in p], False),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other", "same"), METRICS)
def test_a_metric_is_known_by_what_it_does(one: Any, other: Any, same: bool) -> None:
    """Source, and the plain values that it carries along; keys are none of them."""
    assert (function(one) == function(other)) is same


def test_a_metric_without_source_is_known_by_its_code() -> None:
    made: dict[str, Any] = {}
    exec("def one(e, p, t=None):\n    return 1.0\n\n\ndef two(e, p, t=None):\n    return 2.0", made)
    assert function(made["one"])["source"] != function(made["two"])["source"]


def test_lms_are_told_apart_by_what_changes_an_answer_and_without_their_keys() -> None:
    with Provider() as provider, Provider() as other:
        same = model(make_lm(provider.url))
        assert model(make_lm(provider.url, api_key="another")) == same
        assert model(make_lm(other.url)) != same
        assert model(make_lm(provider.url, temperature=0.1)) != same
        assert model(make_lm(provider.url, extra_headers={"x-who": "me"})) != same
        assert "another" not in json.dumps(model(make_lm(provider.url, api_key="another")))
        assert "test" not in json.dumps(same["arguments"])


def test_data_of_all_kinds_can_be_told() -> None:
    """Images, sets, bytes, dates, types, objects that nobody knows."""
    import datetime as dt

    class Thing:
        def __init__(self) -> None:
            self.size = 3

    values = [
        dspy.Image("https://example.com/a.png"), {"b", "a"}, b"\x00", dt.date(2026, 1, 1), int, Thing(), 2**70,
        float("nan"), dspy.Signature("a -> b"), "\ud800",
    ]  # fmt: skip
    sets = {"trainset": [dspy.Example(value=value) for value in values], "valset": None}
    told = described(dspy.LabeledFewShot(), dspy.Predict("value -> a"), sets, None, {})
    assert told == described(dspy.LabeledFewShot(), dspy.Predict("value -> a"), sets, None, {})
    assert len(set(described(dspy.LabeledFewShot(), Plain(), sets, None, {})["datasets"]["trainset"])) == len(values)


def test_inputs_of_an_example_are_part_of_it() -> None:
    one, other = dspy.Example(a=1, b=2).with_inputs("a"), dspy.Example(a=1, b=2).with_inputs("b")
    assert plain(one) != plain(other)


def test_digests_tell_which_part_changed() -> None:
    before = described(dspy.COPRO(metric=metric), Plain(), {"trainset": data(3)}, metric, {"program": dspy.LM("a/b")})
    after = described(dspy.COPRO(metric=metric), Plain(), {"trainset": data(4)}, metric, {"program": dspy.LM("a/b")})
    one, other = digests(before), digests(after)
    assert [name for name in one if one[name] != other[name]] == ["dataset trainset"]
