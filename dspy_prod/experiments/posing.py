"""An experiment as the module that it is called as: what others ask of a program, control's program answers."""

from __future__ import annotations

from typing import Any

from dspy_prod.errors import ConfigError
from dspy_prod.experiments.inside import Inside
from dspy_prod.stores.trials import CREATED


class Posing(Inside):
    """The part of an `Experiment` that stands for a program."""

    @property
    def program(self) -> Any:
        """Control's program."""
        return self.variants[self._control].program

    def named_parameters(self) -> list[tuple[str, Any]]:
        """Control's."""
        return list(self.program.named_parameters())

    def named_predictors(self) -> list[tuple[str, Any]]:
        """Control's."""
        return list(self.program.named_predictors())

    def set_lm(self, lm: Any) -> None:
        """Set the LM of every variant that is no LM itself.

        Raises:
            ConfigError: it has begun, so that what was measured would be mixed up.
        """
        trial = self._works.standing.trial
        if trial is None or trial.state != CREATED:
            raise ConfigError(
                f"Experiment({self.name!r}).set_lm: its variants are pinned once it has begun. Compare the LMs in an "
                "experiment of their own, as variants, or set the LM for all with dspy.configure(lm=...)"
            )
        for each in self.variants.values():
            if each.kind != "lm":
                each.program.set_lm(lm)

    def get_lm(self) -> Any:
        """That of control."""
        return self.program.get_lm()

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """Control's state."""
        state: dict[str, Any] = self.program.dump_state(json_mode=json_mode)
        return state

    def load_state(self, state: dict[str, Any], *, allow_unsafe_lm_state: bool = False) -> Any:
        """Refused: variants stay what they are while they are measured."""
        raise ConfigError(
            f"Experiment({self.name!r}): its variants are pinned. Load the state into a program of its own"
        )
