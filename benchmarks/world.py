"""A world to optimize in: a task, its examples, a model that prompts make better, and a provider with a bill.

with World(seed=1) as world:
    dspy.configure(lm=world.lm())
    best = dspy.MIPROv2(world.metric, prompt_model=world.prompt_lm()).compile(world.program(), ...)
    print(world.bill_usd, len(world.calls))
"""

from __future__ import annotations

import random
from typing import Any, Literal

import dspy

import dspy_prod
from benchmarks.mind import LABELS, Mind, kind_of
from dspy_prod.testing import Call, CallView, Fault, Hang, Provider, Status

TASK = "openai/world-task"
PROPOSER = "openai/world-proposer"
TASK_PRICE = (0.15, 0.60)
CHEAP_PROPOSER = (0.15, 0.60)
DEAR_PROPOSER = (2.50, 10.0)

FaultName = Literal["hang", "500", "429"]
FAULTS: dict[str, Fault] = {"hang": Hang(), "500": Status(500), "429": Status(429, retry_after=25)}

_SUBJECTS = ("the invoice", "my account", "the export", "the mobile app", "the new editor", "a refund", "the login")
_ENDINGS = (
    "since Monday",
    "again",
    "for our team",
    "on the old plan",
    "after the update",
    "as a new customer",
    "today",
)
_BODIES = {
    "billing": ("was charged twice for", "wants a receipt for", "asks what he pays for"),
    "bug": ("sees an error in", "cannot open", "lost work in"),
    "howto": ("wonders where to find", "would like to set up", "asks how to share"),
    "praise": ("thanks us for", "loves", "recommends"),
}


class Triage(dspy.Signature):
    """Sort the message."""

    message: str = dspy.InputField(desc="what a customer wrote")
    label: Literal["billing", "bug", "howto", "praise"] = dspy.OutputField(desc="the department that takes it")


class Support(dspy.Module):
    """Finds the department that a customer's message belongs to."""

    def __init__(self) -> None:
        super().__init__()
        # A signature of its own: InferRules writes its rules into the one that it is given.
        self.classify = dspy.Predict(Triage.with_instructions(Triage.instructions))

    def forward(self, message: str) -> dspy.Prediction:
        return self.classify(message=message)


class World:
    """The task, its examples and its provider; a context manager that runs the provider.

    Args:
        seed: of the examples, and of what helps.
        train, val, test: how many examples there are.
        latency: seconds that each answer takes.
        fault: what happens from request `fault_at` (from 0) on.
        dear: whether the proposer costs about 17 times as much a token as the task's model, or the same.
        varied: whether rollouts at a temperature above 0 differ; proposals always do.
        url: a provider that runs elsewhere with the same seed: then this world only has examples and LMs.
    """

    def __init__(
        self,
        seed: int = 0,
        train: int = 40,
        val: int = 60,
        test: int = 60,
        *,
        latency: float = 0.002,
        fault: FaultName | None = None,
        fault_at: int = 0,
        dear: bool = False,
        varied: bool = True,
        url: str | None = None,
    ) -> None:
        self.seed = seed
        every = _examples(seed, train + val + test)
        self.trainset, self.valset, self.testset = every[:train], every[train : train + val], every[train + val :]
        self.proposer_price = DEAR_PROPOSER if dear else CHEAP_PROPOSER
        self.prices = {TASK: TASK_PRICE, PROPOSER: self.proposer_price}
        self.mind = Mind(seed, {each.message: each.label for each in every}, varied=varied)
        self._url = url
        self._fault: tuple[int, Fault] | None = None
        self.provider = Provider(
            answer=self.mind.answer, latency=latency, prices=self.prices, faults=self._meets, seed=seed
        )
        if fault:
            self.break_from(fault_at, fault)

    def __enter__(self) -> World:
        if self._url is None:
            self.provider.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.provider.stop()

    # -- the provider --------------------------------------------------------------------------------------------------
    @property
    def url(self) -> str:
        """`api_base` of its LMs."""
        return self._url or self.provider.url

    @property
    def bill_usd(self) -> float:
        """What the provider has billed: the truth."""
        return self.provider.bill.usd

    @property
    def calls(self) -> list[Call]:
        """Every request so far, refused ones included."""
        return self.provider.calls

    def kinds(self) -> dict[str, int]:
        """How many requests of each kind were answered."""
        return dict(self.mind.asked)

    def break_from(self, call: int, fault: FaultName | Fault) -> None:
        """From request number `call` on, everything meets the fault."""
        self._fault = call, FAULTS[fault] if isinstance(fault, str) else fault

    def mend(self) -> None:
        """Everything is well again; requests that hang go on hanging."""
        self._fault = None

    def _meets(self, call: CallView) -> Fault | None:
        fault = self._fault
        return fault[1] if fault and call.index >= fault[0] else None

    # -- the task ------------------------------------------------------------------------------------------------------
    def program(self, kind: Literal["module", "cot", "choice"] = "module") -> dspy.Module:
        """The program to optimize: a module, `dspy.ChainOfThought`, or a predictor that answers with a `Choice`."""
        if kind == "module":
            return Support()
        return (
            dspy.ChainOfThought(Triage.with_instructions(Triage.instructions))
            if kind == "cot"
            else dspy.Predict(_choice())
        )

    def metric(self, example: Any, prediction: Any, trace: Any = None, *_: Any) -> float:
        """1.0 for the right label, else 0.0."""
        return float(label_of(prediction) == example.label)

    def feedback_metric(
        self, gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
    ) -> dspy.Prediction:
        """The score with a sentence that says what was wrong, as GEPA wants it."""
        score = self.metric(gold, pred)
        return dspy.Prediction(score=score, feedback="Right." if score else f"Wrong: it is {gold.label}.")

    def accuracy(self, program: dspy.Module, examples: list[Any] | None = None) -> float:
        """Share of the examples (of the valset) that a program gets right; it asks the provider for them."""
        chosen = self.valset if examples is None else examples
        return sum(self.metric(each, program(**each.inputs())) for each in chosen) / len(chosen)

    # -- LMs -----------------------------------------------------------------------------------------------------------
    def lm(self, *, plain: bool = False, **more: Any) -> Any:
        """The cheap model that does the task: `dspy_prod.LM`, or `dspy.LM`."""
        return self._connect(TASK, plain, {"max_tokens": 40, "temperature": 0.0, **more})

    def prompt_lm(self, *, plain: bool = False, **more: Any) -> Any:
        """The model that proposes instructions."""
        return self._connect(PROPOSER, plain, {"max_tokens": 300, "temperature": 1.0, **more})

    def _connect(self, model: str, plain: bool, more: dict[str, Any]) -> Any:
        more = {"api_base": self.url, "api_key": "none", **more}
        if plain:
            return dspy.LM(model, **{"num_retries": 0, **more})
        prices = {name: dspy_prod.Price(input=each[0], output=each[1]) for name, each in self.prices.items()}
        return dspy_prod.LM(model, **{"prices": prices, **more})


def label_of(prediction: Any) -> Any:
    """The label of an answer, whichever program gave it."""
    label = getattr(prediction, "label", None)
    return getattr(label, "value", label)


def _examples(seed: int, count: int) -> list[Any]:
    draw = random.Random(f"examples {seed}")
    found = []
    for number in range(count):
        label = LABELS[number % 4]
        text = (
            f"Customer {1000 + number} {draw.choice(_BODIES[label])} {draw.choice(_SUBJECTS)} "
            f"{draw.choice(_ENDINGS)}, and needs to hear from us within {draw.randint(2, 30)} hours."
        )
        found.append(dspy.Example(message=text, label=label).with_inputs("message"))
    draw.shuffle(found)
    return found


def _choice() -> Any:
    from dspy.adapters.types.decision import Choice

    options: Any = tuple((label, f"what belongs to {label}") for label in LABELS)

    fields = {
        "message": (str, dspy.InputField(desc="what a customer wrote")),
        "label": (Choice[options], dspy.OutputField(desc="its department")),
    }
    return dspy.Signature(fields, "Sort the message.")


def optimizers(world: World, **more: Any) -> Any:
    """Every optimizer of DSPy that calls LMs, small: see `benchmarks.subjects`."""
    from benchmarks.subjects import optimizers as every

    return every(world, **more)


__all__ = ["FAULTS", "PROPOSER", "TASK", "Support", "Triage", "World", "kind_of", "label_of", "optimizers"]
