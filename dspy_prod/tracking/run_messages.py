"""Runs and feedback in MLflow for what goes on while calls are served, such as an experiment: told, never waited for.

What is told goes the way of the traces: through the courier's queue, after the traces before it, to the exporter
process, which tries again while MLflow is away. What is lost is counted, in `status()` too.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Final, Literal

from dspy_prod.errors import ConfigError
from dspy_prod.tracking import setup

Source = Literal["code", "human", "llm_judge"]
Status = Literal["FINISHED", "FAILED", "KILLED"]

LONGEST: Final = 5000
"""Characters of a tag, a parameter or a rationale; MLflow refuses longer ones."""
_LONGEST_NAME: Final = 250
_LINKS: Final = 1000
"""Traces in one message."""


@dataclass(frozen=True)
class RunMessages:
    """Tells of runs, and of feedback on traces.

    It tells whatever tracking is on at the time; while it is off, nothing is told, and each method returns False.

    Args:
        scope: begins the keys of all its runs, so that two who name their runs alike do not meet.

    Example:
        ```python
        told = RunMessages("experiment/triage-cot")
        run = told.open("cot", tags={"variant": "cot"}, params={"version": "triage/7"})
        run.log({"resolved": 0.83, "usd_per_1000": 0.32}, step=400)
        run.link(["tr-4f1c..."])
        told.feedback("tr-4f1c...", "resolved", True, source="human")
        run.end()
        ```
    """

    scope: str = ""

    def open(
        self,
        name: str,
        *,
        key: str | None = None,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        parent: TrackedRun | None = None,
        note: str | None = None,
    ) -> TrackedRun:
        """Make a run, or go on with the one of the same key: by whatever process it was made, and though it had ended.

        Args:
            name: as MLflow shows it. key: tells runs apart, also after a restart; default: the name.
            tags: also found again by them in MLflow. params: MLflow keeps the first value of each.
            parent: the run that it is shown below.
            note: the run's description, in Markdown.
        """
        told = [each for each in (self.scope, key or name) if each]
        run = TrackedRun("/".join(told).replace("'", "’"), _short(name, _LONGEST_NAME),
                         None if parent is None else parent.key)  # fmt: skip
        described = {} if note is None else {"mlflow.note.content": note}
        run._tell(
            open=True,
            tags={str(name): _short(value) for name, value in {**(tags or {}), **described}.items()},
            params={str(name): _short(value) for name, value in (params or {}).items()},
        )
        return run

    def feedback(
        self,
        trace_id: str,
        name: str,
        value: bool | float | str,
        *,
        source: Source = "code",
        who: str | None = None,
        rationale: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> bool:
        """Add feedback to a trace, as MLflow's assessment. A trace may come to MLflow two minutes later.

        Args:
            trace_id: `tr-...`, as in a `CallReport`. name: what was assessed, such as `"resolved"`.
            value: a boolean, a finite number, or a word.
            source: who says so. who: by which name.
            rationale: why. It is content: not told with `content="off"`.
            metadata: more of it.

        Returns:
            Whether tracking is on.

        Raises:
            ConfigError: an impossible value or source.
        """
        if not isinstance(value, (bool, int, float, str)) or (isinstance(value, float) and not isfinite(value)):
            raise ConfigError(f"feedback(value={value!r}): a boolean, a finite number or a text")
        if source not in ("code", "human", "llm_judge"):
            raise ConfigError(f"feedback(source={source!r}): use 'code', 'human' or 'llm_judge'")
        one = {
            "id": uuid.uuid4().hex,
            "trace": trace_id,
            "name": _short(name, _LONGEST_NAME),
            "value": _short(value) if isinstance(value, str) else value,
            "source": source,
            "who": None if who is None else _short(who, _LONGEST_NAME),
            "rationale": None if rationale is None else _short(rationale),
            "metadata": {str(key): _short(each, _LONGEST_NAME) for key, each in (metadata or {}).items()},
            "at": time.time_ns() // 1_000_000,
        }
        return _tell({"feedback": [one]})

    @property
    def lost(self) -> int:
        """Messages that were left out or that MLflow refused, of all since tracking was turned on."""
        courier = setup.courier()
        return 0 if courier is None else courier.messages.lost

    @property
    def refusal(self) -> str | None:
        """Why the last of those was."""
        courier = setup.courier()
        return None if courier is None else courier.messages.refusal


@dataclass(frozen=True)
class TrackedRun:
    """One run, as somebody tells of it.

    Attributes:
        key: by which it is found again, MLflow's tag `dspy_prod.key`. name: as MLflow shows it.
        parent: the key of the run above.

    Example:
        ```python
        run = tracking.RunMessages("nightly").open("import", params={"rows": "1200"})
        run.log({"resolved": 0.83}, step=1)
        run.end()
        ```
    """

    key: str
    name: str
    parent: str | None = field(default=None, repr=False)

    @property
    def id(self) -> str | None:
        """MLflow's id of it; None until MLflow has it."""
        courier = setup.courier()
        return None if courier is None else courier.messages.ids.get(self.key)

    def log(self, metrics: Mapping[str, float | None], *, step: int = 0, at: float | None = None) -> bool:
        """Add values of metrics; None and what is not finite is left out.

        Args:
            step: on MLflow's axis. at: seconds since the epoch; default: now.
        """
        when = round((time.time() if at is None else at) * 1000)
        known = {name: float(value) for name, value in metrics.items() if value is not None and isfinite(value)}
        return self._tell(metrics=[(name, value, step, when) for name, value in known.items()])

    def tag(self, **tags: Any) -> bool:
        """Set tags, such as its state."""
        return self._tell(tags={name: _short(value) for name, value in tags.items()})

    def note(self, markdown: str) -> bool:
        """Replace its description."""
        return self._tell(tags={"mlflow.note.content": _short(markdown)})

    def text(self, path: str, text: str) -> bool:
        """Add an artifact, such as `report.html`."""
        return self._tell(texts={path: text})

    def link(self, trace_ids: Iterable[str]) -> bool:
        """Put traces onto its page. Those that were linked before stay so."""
        ids = list(dict.fromkeys(trace_ids))
        told = [self._tell(links=ids[at : at + _LINKS]) for at in range(0, len(ids), _LINKS)]
        return all(told)

    def end(self, status: Status = "FINISHED", *, at: float | None = None) -> bool:
        """It has ended; `RunMessages.open` goes on with it.

        Args:
            at: when, in seconds since the epoch; default: now.
        """
        return self._tell(status=status, end=round((time.time() if at is None else at) * 1000))

    def _tell(self, **told: Any) -> bool:
        above = {} if self.parent is None else {"parent": self.parent}
        return _tell({"run": self.key, "name": self.name, "shared": True, **above, **told})


def _tell(message: dict[str, Any]) -> bool:
    courier = setup.courier()
    if courier is None:
        return False
    courier.tell(message)
    return True


def _short(value: Any, longest: int = LONGEST) -> str:
    text = str(value)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
