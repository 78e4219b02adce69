"""What goes to another process and back: anything, by cloudpickle as Ray does it, and never with a key.

An LM travels with its settings and without its secrets; in the other process keys come from the environment.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import dspy

from dspy_prod.errors import ConfigError
from dspy_prod.lm.lm import LM
from dspy_prod.lm.sealing import SealedLM
from dspy_prod.policies.run import Run
from dspy_prod.privacy.known import blotted_in, known
from dspy_prod.privacy.outward import outward
from dspy_prod.runtime.clock import SYSTEM_CLOCK
from dspy_prod.stores.base import Store


class Parcel:
    """Things, packed.

    Args:
        parts: what to pack, by the names under which errors tell of it. What several of them share is shared again.

    Attributes:
        data: the bytes. stores: of the LMs in it.

    Raises:
        ConfigError: something cannot travel; the message names the part, and the remedy.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.stores: list[Store] = []
        try:
            self.data = self._packed(dict(parts))
        except Exception as error:
            raise ConfigError(_said(self._culprit(parts), error)) from error
        if blotted_in(self.data, known()) is not self.data:
            raise ConfigError(
                f"evaluate: {self._telltale(parts)} holds what is known as a key or a password, which must not travel "
                "with it: take it from the environment where it is used, as os.environ[...]"
            )

    def _packed(self, value: Any) -> bytes:
        file = io.BytesIO()
        _Packer(file, self.stores).dump(value)
        return file.getvalue()

    def _culprit(self, parts: Mapping[str, Any]) -> str:
        for name, part in parts.items():
            try:
                self._packed(part)
            except Exception:
                return name
        return ", ".join(parts)

    def _telltale(self, parts: Mapping[str, Any]) -> str:
        secrets = known()
        for name, part in parts.items():
            data = self._packed(part)
            if blotted_in(data, secrets) is not data:
                return name
        return ", ".join(parts)


def unpacked(data: bytes) -> Any:
    """What was packed, in this process."""
    return pickle.loads(data)


class _Packer(cloudpickle.Pickler):
    """Refuses what would not be itself elsewhere."""

    def __init__(self, file: io.BytesIO, stores: list[Store]) -> None:
        super().__init__(file)
        self._stores = stores
        self._sealed: list[Any] = []  # kept alive, so that nothing else has their ids

    def reducer_override(self, obj: Any) -> Any:
        """What pickle asks first how to take an object apart."""
        if isinstance(obj, SealedLM):
            self._sealed.append(obj.bare)
        elif isinstance(obj, LM):
            self._see(obj)
        elif isinstance(obj, dspy.BaseLM) and not any(obj is each for each in self._sealed):
            raise ConfigError(
                f"{type(obj).__name__}({getattr(obj, 'model', '?')!r}) would take its key along, and no cap or limit "
                "would hold it: make it a dspy_prod.LM, or dspy_prod.wrap(...) it"
            )
        elif isinstance(obj, Run):
            raise ConfigError(f"it holds {obj!r}: give that to evaluate(run=...), which has it in every worker")
        return super().reducer_override(obj)

    def _see(self, lm: LM) -> None:
        store = lm.pipeline.store
        if not store.durable:
            raise ConfigError(
                f"{lm!r} keeps its state in {store.url}, which no other process sees, so that workers could share no "
                "budget and no limit: give it store='sqlite:///.dspy_prod/state.db' on one machine"
            )
        if lm.settings.clock is not SYSTEM_CLOCK:
            raise ConfigError(f"{lm!r} has a clock of its own, which is of this process alone")
        if not any(store is each for each in self._stores):
            self._stores.append(store)


def _said(name: str, error: Exception) -> str:
    text = outward(str(error))
    if isinstance(error, ConfigError):
        return f"evaluate: {name} cannot go to a worker: {text}"
    return (
        f"evaluate: {name} cannot go to a worker ({type(error).__name__}: {text}): make what it holds where it is "
        "used, or use engine='threads'"
    )
