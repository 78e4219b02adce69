"""DSPy's own optimizers with and without racing, on an engine that answers for nothing and counts what it is asked."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, Final

import dspy
from dspy.lm15 import Message, Request, Response, TextPart, Usage
from dspy.utils.callback import BaseCallback

from dspy_prod.compat import racing
from dspy_prod.optimize.racing import Contest

TRAIN: Final = 40
VAL: Final = 200
THREADS: Final = 8


def _luck(*what: object) -> float:
    """A number from 0 to 1 that depends on nothing but this."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:7], "big") / 2**56


def _normal(*what: object) -> float:
    return math.sqrt(-2 * math.log(1 - _luck(*what, "r"))) * math.cos(2 * math.pi * _luck(*what, "a"))


class Engine:
    """A model whose answers depend on the prompt: instructions and demonstrations make it better or worse, and examples
    are easy or hard. The same request has the same answer; it is counted once, as with a cache."""

    def __init__(self, seed: int) -> None:
        self._seed, self._lock = seed, threading.Lock()
        self._asked: set[str] = set()

    @property
    def calls(self) -> int:
        """Different requests so far."""
        return len(self._asked)

    def complete(self, request: Request) -> Response:
        texts = [message.text or "" for message in request.messages]
        prompt = repr((request.system, texts))
        with self._lock:
            self._asked.add(prompt)
        return Response(
            id="x",
            model="free",
            message=Message.assistant([TextPart(self._answer(str(request.system), texts))]),
            finish_reason="stop",
            usage=Usage(input_tokens=len(prompt) // 4, output_tokens=12),
        )

    def _answer(self, system: str, texts: list[str]) -> str:
        fields = re.findall(r"\d+\. `(\w+)`", system.partition("Your output fields are:")[2].partition("All inter")[0])
        number = re.search(r"## question ## \]\]\s*number (\d+)", texts[-1])
        if number is None or "answer" not in fields:  # a proposer's questions: about the task, or for an instruction
            says = f"Answer the question, way {int(1000 * _luck(self._seed, system, texts))}."
            return "".join(f"[[ ## {field} ## ]]\n{says}\n\n" for field in fields) + "[[ ## completed ## ]]"
        ability = 0.4 * _normal(self._seed, system, texts[:-1])
        ease = 1.5 * _normal(self._seed, "example", number[1])
        right = _luck(self._seed, system, texts) < 1 / (1 + math.exp(-(0.5 + ability + ease)))
        return f"[[ ## answer ## ]]\n{number[1] if right else 'none'}\n\n[[ ## completed ## ]]"


class Racer(BaseCallback):  # type: ignore[misc]
    """Gives each evaluation of the selection set its heat, and notes what was evaluated completely."""

    def __init__(self, contest: Contest) -> None:
        self.contest = contest
        self._open: dict[str, str] = {}

    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        devset = inputs.get("devset") or instance.devset
        if len(devset) != self.contest.n:
            return
        key = self._open[call_id] = state(inputs["program"])
        heat = self.contest.heat(key)
        if heat is not None:
            racing.HEATS[call_id] = heat

    def on_evaluate_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        heat, key = racing.HEATS.pop(call_id, None), self._open.pop(call_id, None)
        if key is not None and outputs is not None and (heat is None or not heat.dropped):
            self.contest.complete(key, [float(score) for *_, score in outputs.results])


def state(program: dspy.Module) -> str:
    """What a program is: its instructions and demonstrations."""
    return json.dumps(program.dump_state(), sort_keys=True, default=str)


def right(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
    """The metric."""
    return bool(prediction.answer == example.answer)


def _examples(first: int, count: int) -> list[dspy.Example]:
    numbers = range(first, first + count)
    return [dspy.Example(question=f"number {n}", answer=str(n)).with_inputs("question") for n in numbers]


def random_search(lm: dspy.LM, seed: int) -> dspy.Module:
    """16 sets of demonstrations."""
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        right, max_bootstrapped_demos=3, max_labeled_demos=6, num_candidate_programs=13, num_threads=THREADS
    )
    program = dspy.Predict("question -> answer")
    return optimizer.compile(program, trainset=_examples(0, TRAIN), valset=_examples(TRAIN, VAL))


def mipro(lm: dspy.LM, seed: int) -> dspy.Module:
    """Six instructions and six sets of demonstrations; every trial is evaluated in full."""
    optimizer = dspy.MIPROv2(
        right, prompt_model=lm, task_model=lm, auto=None, num_candidates=6, max_bootstrapped_demos=3,
        max_labeled_demos=3, num_threads=THREADS, seed=seed,
    )  # fmt: skip
    return optimizer.compile(
        dspy.Predict("question -> answer"), trainset=_examples(0, TRAIN), valset=_examples(TRAIN, VAL),
        num_trials=18, minibatch=False, seed=seed,
    )  # fmt: skip


OPTIMIZERS: Final[dict[str, Callable[[dspy.LM, int], dspy.Module]]] = {
    "BootstrapFewShotWithRandomSearch": random_search,
    "MIPROv2, minibatch=False": mipro,
}


@contextlib.contextmanager
def _quiet() -> Any:
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def compiled(name: str, seed: int, raced: bool) -> tuple[str, int, int]:
    """(the program it returned, calls, evaluations saved) of one run."""
    engine, contest = Engine(seed), Contest(VAL, delta=0.1, seed=seed)
    lm = dspy.LM("openai/free", engine=engine, cache=False, num_retries=0)
    callbacks = [Racer(contest)] if raced else []
    with _quiet(), dspy.context(lm=lm, callbacks=callbacks, adapter=dspy.ChatAdapter()):
        program = OPTIMIZERS[name](lm, seed)
    return state(program), engine.calls, contest.saved


def runs(processes: Executor, seed: int, count: int) -> list[Future[Any]]:
    """Each optimizer in so many worlds, with and without racing: what `compared` gives of each."""
    return [processes.submit(compared, name, world) for world in range(seed, seed + count) for name in OPTIMIZERS]


def compared(name: str, seed: int) -> dict[str, Any]:
    """One optimizer in one world, without racing and with it."""
    racing.install()
    (plain, without, _), (raced, calls, saved) = (compiled(name, seed, on) for on in (False, True))
    return {
        "optimizer": name, "seed": seed, "without": without, "with": calls, "calls": calls / without,
        "same": plain == raced, "saved": saved,
    }  # fmt: skip
