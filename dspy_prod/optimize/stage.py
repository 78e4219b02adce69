"""The stage of a rehearsal: it answers every LM call as the pilot's program did, for nothing, and writes the bill.

A predictor of the program answers an example as it was answered in the pilot, right as often as it was right there,
by labels and by other examples' answers where the pilot has none. What else is asked, a proposer or a judge, answers as
it did when it was really asked, which happens a few times for each kind of question.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from dspy.clients.backend_selection import CLIENT_KEYS
from dspy.lm15 import Message, Response, TextPart, Usage
from dspy.utils.callback import BaseCallback

from dspy_prod.compat.dspy import input_keys
from dspy_prod.optimize.bill import Bill
from dspy_prod.optimize.gate import Closed
from dspy_prod.optimize.invented import UNKNOWN, cut, made_up, share, varied, words
from dspy_prod.optimize.pilot import Answer, Kind, Measured, Pilot, Played, chars_of, key_of, kind_of, model_of
from dspy_prod.optimize.samples import Samples
from dspy_prod.pricing.rates import Rates
from dspy_prod.privacy.names import is_secret

ALIKE: Final = 0.5
"""How much prompts and rollouts agree on which examples are hard: 0 is chance, 1 would be the same ones always."""

_FREE: Final[Kind] = ((), ())


class Asked(NamedTuple):
    """What an adapter is about to ask."""

    adapter: Any
    signature: Any
    inputs: Mapping[str, Any]


@dataclass
class _Scene:
    """One example that a program answers: how often each of its predictors was asked."""

    key: str
    asked: Counter[Kind] = field(default_factory=Counter)


_ASKED: ContextVar[Asked | None] = ContextVar("dspy_prod_stage_asked", default=None)
_SCENE: ContextVar[_Scene | None] = ContextVar("dspy_prod_stage_scene", default=None)


class Stage(BaseCallback):
    """Answers and counts, for one seed.

    Args:
        pilot: what the program was like. samples: what others say. examples: everything it may be asked.
        seed: of who is right when. rates: prices by LM. caches: whether an LM answers the same for nothing.
        step: called after each answer.
    """

    def __init__(
        self,
        pilot: Pilot,
        samples: Samples,
        examples: Sequence[Any],
        seed: int,
        rates: Callable[[Any], Rates | None],
        caches: Callable[[Any], bool],
        step: Callable[[], None] = lambda: None,
    ) -> None:
        self._pilot, self._samples, self._seed = pilot, samples, seed
        self._rates, self._caches, self._step = rates, caches, step
        self._over = False
        self._examples = {key_of(example.inputs().toDict()): example for example in examples if input_keys(example)}
        self._labels = {key: dict(example.labels().toDict()) for key, example in self._examples.items()}
        self._right = [key for key, each in pilot.played.items() if each.answers and (each.score or 0) >= pilot.good]
        self._wrong = [key for key, each in pilot.played.items() if each.answers and (each.score or 0) < pilot.good]
        self._all = [*self._right, *self._wrong]
        self._kinds = pilot.kinds
        self._good = pilot.good
        self._deciding = _deciding(pilot)
        self._share: float = pilot.accuracy ** (1 / max(1, len(self._deciding)))
        self._cache: dict[str, list[str]] = {}
        self._read_back: dict[tuple[Kind, type[Any]], bool] = {}
        self._times: Counter[tuple[str, Kind]] = Counter()
        self._scenes: set[str] = set()
        self._lock = threading.Lock()
        self.bill = Bill()

    @contextmanager
    def playing(self) -> Iterator[None]:
        """Until its end answers are given. What still runs in a thread then, since the optimizer did not wait for it or
        Ctrl-C came, must not ask the LMs themselves."""
        try:
            yield
        finally:
            self._over = True

    # -- who is asked --------------------------------------------------------------------------------------------------
    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if self._over:
            raise Closed("the rehearsal is over")

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if self._over:
            raise Closed("the rehearsal is over")
        key = key_of(inputs.get("kwargs") or {})
        if key in self._examples and (_SCENE.get() is None or _SCENE.get().key != key):  # type: ignore[union-attr]
            _SCENE.set(_Scene(key))
            self._scenes.add(call_id)

    def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        if call_id in self._scenes:
            self._scenes.discard(call_id)
            _SCENE.set(None)

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if inputs.get("signature") is not None:
            _ASKED.set(Asked(instance, inputs["signature"], inputs.get("inputs") or {}))

    # -- answering -----------------------------------------------------------------------------------------------------
    def answer(self, lm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `lm(*args, **kwargs)` gives."""
        asked = _ASKED.get()
        _ASKED.set(None)
        settings = {**getattr(lm, "kwargs", {}), **kwargs}
        messages = settings.pop("messages", None) or settings.pop("prompt", None) or args
        n = settings.get("n") or 1
        key = _told(lm, messages, settings)
        # What is drawn depends on no address or key: the same forecast wherever it is asked for.
        said = {name: each for name, each in settings.items() if name not in CLIENT_KEYS and not is_secret(name)}
        drawn = _told(lm, messages, said)
        cached = self._caches(lm) and settings.get("cache", True) is not False
        with self._lock:
            texts = self._cache.get(key) if cached else None
        hit = texts is not None
        if texts is None:
            texts = [self._text(lm, asked, drawn, position, args, kwargs) for position in range(n)]
            texts = [cut(text, settings.get("max_tokens")) for text in texts]
        with self._lock:
            if cached:
                texts = self._cache.setdefault(key, texts)
            if hit:
                self.bill.cached += 1
            else:
                self._charge(lm, asked, chars_of({"messages": messages, "prompt": args[0] if args else None}), texts)
        self._step()
        if args and not isinstance(args[0], str) and not kwargs.get("messages"):
            return Response(
                id=None, model=model_of(lm), message=Message.assistant([TextPart(texts[0])]), finish_reason="stop",
                usage=Usage(input_tokens=1, output_tokens=1),
            )  # fmt: skip
        return list(texts)

    def _charge(self, lm: Any, asked: Asked | None, chars: int, texts: list[str]) -> None:
        model = model_of(lm)
        measured = self._pilot.models.get(model) or Measured()
        own = asked is not None and kind_of(asked.signature) in self._kinds
        self.bill.charge(model, measured, self._rates(lm), chars, texts, own)

    def _text(
        self, lm: Any, asked: Asked | None, key: str, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str:
        kind = _FREE if asked is None else kind_of(asked.signature)
        if asked is not None and kind in self._kinds:
            played = self._played(asked, kind, key, position)
            if played is not None:
                return played
        with self._lock:
            self._times[model_of(lm), kind] += 1
            number = self._times[model_of(lm), kind]
        said = self._samples.text(lm, kind, number, args, kwargs)
        if asked is None:
            return varied(said or "```\n" + words(UNKNOWN, key) + "\n```", f"{self._seed}{key}{position}")
        if said is None:
            return _formatted(asked, {name: made_up(each.annotation, key) for name, each in _outputs(asked)})
        try:
            values = dict(asked.adapter.parse(asked.signature, said))
        except Exception:  # what it said in another adapter's words, or cut off: said again as it was
            return said
        salt = f"{self._seed}{key}{position}"
        return _formatted(asked, {
            name: varied(value, salt) if isinstance(value, str) and len(value) > 30 else value
            for name, value in values.items()
        })  # fmt: skip

    def _played(self, asked: Asked, kind: Kind, key: str, position: int) -> str | None:
        """What a predictor of the program answers."""
        scene = _SCENE.get()
        example = scene.key if scene is not None else key_of(asked.inputs)
        turn = 0
        if scene is not None:
            turn = scene.asked[kind]
            scene.asked[kind] += 1
        own = self._pilot.played.get(example)
        decides = kind in self._deciding
        right = not decides or share(self._seed, "right", key, position) < self._chance(example, own)
        labels = {name: label for name, label in self._labels.get(example, {}).items() if name in kind[1]}
        names = [name for name, label in labels.items() if _takes(asked, name, label)]
        source = own if own is not None and own.answers else None
        fits = source is not None and (not decides or ((source.score or 0) >= self._good) is right)
        if not fits and not (names and source is not None):
            source = self._instead(example, {name: labels[name] for name in labels if name not in names}, right)
        answer = None if source is None else _nth(source, kind, turn)
        if answer is None:
            return None
        values = dict(answer.values or {})
        if decides and not fits:
            for name in names:
                values[name] = labels[name] if right else self._other(name, labels[name], key)
        return _formatted(asked, values) if self._is_read_back(asked, values) else answer.text

    def _is_read_back(self, asked: Asked, values: Mapping[str, Any]) -> bool:
        """Whether an adapter understands what it writes for a predictor, which is not so for every type of field."""
        which = kind_of(asked.signature), type(asked.adapter)
        known = self._read_back.get(which)
        if known is None:
            try:
                asked.adapter.parse(asked.signature, _formatted(asked, values))
                known = True
            except Exception:  # as it fails in the program
                known = False
            self._read_back[which] = known
        return known

    def _instead(self, example: str, labels: Mapping[str, Any], right: bool) -> Played | None:
        """Another example's answers, by which this one is answered right or wrong.

        Args:
            labels: what no answer can be made of, as a label `"billing"` of a field that wants more than a text; right
                is what answered an example with the same ones right, and wrong what did so with others.
        """
        pool = (self._right if right else self._wrong) or self._all
        if labels:
            alike = [key for key in self._right if (labels.items() <= self._labels.get(key, {}).items()) is right]
            pool = alike or pool
        return self._pilot.played[pool[int(share(self._seed, "as", example, right) * len(pool))]] if pool else None

    def _chance(self, example: str, own: Played | None) -> float:
        """How likely an example is answered right: more so if it was, since some are easy for all prompts."""
        if own is not None and own.score is not None:
            easy = own.score >= self._good
        else:
            easy = share(self._seed, "easy", example) < self._share
        chance: float = ALIKE * easy + (1 - ALIKE) * self._share
        return chance

    def _other(self, name: str, label: Any, key: str) -> Any:
        """A wrong answer in the place of a label: another example's."""
        others = [each[name] for each in self._labels.values() if name in each and each[name] != label]
        return others[int(share(self._seed, "other", key) * len(others))] if others else label


def _told(lm: Any, messages: Any, settings: Mapping[str, Any]) -> str:
    return json.dumps([model_of(lm), messages, settings], default=str, sort_keys=True)


def _deciding(pilot: Pilot) -> set[Kind]:
    """The predictors that the score depends on: those whose outputs are labels, else the last one of each example."""
    labels = {name for example in pilot.examples for name in dict(example.labels())}
    found = {kind for kind in pilot.kinds if labels & set(kind[1])}
    return found or {played.answers[-1].kind for played in pilot.played.values() if played.answers}


def _nth(played: Played, kind: Kind, turn: int) -> Answer | None:
    """A predictor's answer number `turn`; its last one, if it was not asked that often."""
    found = [answer for answer in played.answers if answer.kind == kind and answer.values is not None]
    return found[min(turn, len(found) - 1)] if found else None


def _outputs(asked: Asked) -> list[tuple[str, Any]]:
    return list(asked.signature.output_fields.items())


def _takes(asked: Asked, name: str, label: Any) -> bool:
    """Whether a field can be answered with a label as it is."""
    from pydantic import TypeAdapter

    try:
        TypeAdapter(asked.signature.output_fields[name].annotation).validate_python(label)
    except Exception:  # of another type, or of one that pydantic does not know
        return False
    return True


def _formatted(asked: Asked, values: Mapping[str, Any]) -> str:
    """As the adapter wants it: it writes its demonstrations in the same form."""
    return str(asked.adapter.format_assistant_message_content(asked.signature, dict(values)))
