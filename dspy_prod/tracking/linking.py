"""Traces and the prompt versions that answered: from a version's page in MLflow its traces are listed, and the
experiment's own page of prompts lists the prompts that answered in it.

In the exporter process. MLflow wants a request for each trace, which takes longer than writing it: links are made when
nothing waits to be written, so that a burst of calls is in MLflow first, and its links follow.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

from dspy_prod.compat.mlflow import EXPERIMENTS, link_together
from dspy_prod.tracking.attributes import TAG, dumped
from dspy_prod.tracking.exporting import BACK_OFF, PATIENCE, is_final, status_of

LINKED: Final = "mlflow.linkedPrompts"
"""The tag of a trace by which its page names the prompts."""
MOST_WAITING: Final = 50_000
"""Traces that may wait for their links; the oldest ones then stay without, but for the tag."""
TOGETHER: Final = 100
"""Traces that are linked before it is looked whether something is to be written."""
_AT_A_TIME: Final = 4
_FORGOTTEN: Final = 60.0
"""Seconds after which a prompt that was not there is looked for again."""
_MANIFEST: Final = "dspy_prod_manifest"
"""The tag of a program version that lists the prompts of its predictors; the registry writes it."""

Ref = tuple[str, str]
"""Name and version of a prompt."""


class _Link(NamedTuple):
    """A trace to be linked; `place`: its experiment."""

    trace: str
    refs: tuple[Ref, ...]
    place: str


class Links:
    """See the module's docstring.

    Args:
        client: gives MLflow's client. store: gives its tracking store.

    Attributes:
        asked, settled: traces that were to be linked so far, and those that are, or never will be.
    """

    def __init__(self, client: Callable[[], Any], store: Callable[[], Any]) -> None:
        self._client = client
        self._store = store
        self.asked = self.settled = 0
        self._waiting: deque[_Link] = deque()
        self._listed: set[tuple[str, str]] = set()  # (prompt, experiment) that needs nothing any more
        self._refs: dict[Ref, tuple[Ref, ...]] = {}
        self._missing: dict[Ref, float] = {}
        self._failures = 0
        self._again_at = 0.0
        self._supported = True

    def refs(self, tag: str | None) -> tuple[Ref, ...]:
        """The prompt versions in a tag of a trace, each program with those of its predictors."""
        try:
            found = [(str(one["name"]), str(one["version"])) for one in json.loads(tag or "[]")]
        except (ValueError, TypeError, KeyError):
            return ()  # somebody else's tag
        return tuple(dict.fromkeys(each for ref in found for each in (ref, *self._predictors(ref))))

    def completed(self, spans: Iterable[dict[str, Any]]) -> dict[str, tuple[Ref, ...]]:
        """What root spans have to be linked to, by `tr-...`; their tags name all of it from here on."""
        found: dict[str, tuple[Ref, ...]] = {}
        for one in spans:
            attributes = one["attributes"]
            coded = attributes.get(TAG + LINKED)
            if coded is None:
                continue
            refs = found[json.loads(attributes["mlflow.traceRequestId"])] = self.refs(json.loads(coded))
            attributes[TAG + LINKED] = dumped(tag_of(refs))
        return found

    def add(self, found: Mapping[str, tuple[Ref, ...]], places: Mapping[str, str], usual: str) -> None:
        """Have traces linked; `places`: experiments of those that are not in the usual one, by `tr-...`."""
        for trace, refs in found.items():
            self._waiting.append(_Link(trace, refs, places.get(trace, usual)))
            self.asked += 1
        while len(self._waiting) > MOST_WAITING:
            self._waiting.popleft()
            self.settled += 1

    def pause(self) -> float | None:
        """Seconds after which there is something to do; None when there is nothing."""
        return max(0.0, self._again_at - time.monotonic()) if self._waiting else None

    def step(self) -> None:
        """Make some links. What cannot be reached is tried again later; what MLflow refuses is left out."""
        some = [self._waiting[place] for place in range(min(TOGETHER, len(self._waiting)))]
        try:
            self._list(some)
            self._link(some)
        except Exception as error:
            self._failures += 1
            if status_of(error) is not None and self._failures >= PATIENCE:
                pass  # MLflow answers, and will have none of it
            elif not is_final(error):
                self._again_at = time.monotonic() + min(BACK_OFF[0] * 2**self._failures, BACK_OFF[1])
                return
        self._failures = 0
        for _ in some:
            self._waiting.popleft()
        self.settled += len(some)

    def _link(self, some: list[_Link]) -> None:
        store = self._store()
        if not self._supported or link_together(
            store, [(one.trace, f"{name}/{version}") for one in some for name, version in one.refs]
        ):
            return
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            for _ in pool.map(lambda one: self._link_one(store, one), some):
                pass

    def _link_one(self, store: Any, one: _Link) -> None:
        from mlflow.entities.model_registry import PromptVersion

        make: Any = PromptVersion
        versions = [make(name=name, version=int(version), template="") for name, version in one.refs]
        try:
            store.link_prompts_to_trace(one.trace, versions)
        except Exception as error:
            if status_of(error) != 404:  # else the trace is gone, or this server is too old for links
                raise
            self._supported = getattr(error, "error_code", "") != "ENDPOINT_NOT_FOUND"

    def _list(self, some: list[_Link]) -> None:
        """Have the experiments' pages list the prompts."""
        client = self._client()
        for name, place in {(name, one.place) for one in some for name, _ in one.refs} - self._listed:
            prompt = client.get_prompt(name)
            if prompt is not None:
                ids = [each for each in str(prompt.tags.get(EXPERIMENTS, "")).split(",") if each]
                if place not in ids:
                    client.set_prompt_tag(name, EXPERIMENTS, f",{','.join([*ids, place])},")
            self._listed.add((name, place))

    def _predictors(self, ref: Ref) -> tuple[Ref, ...]:
        """The prompts of a program's predictors; none when it has none of their own, or cannot be looked at now."""
        known = self._refs.get(ref)
        if known is not None:
            return known
        if time.monotonic() < self._missing.get(ref, 0.0):
            return ()
        try:
            prompt = self._client().get_prompt_version(*ref)
            told = json.loads(prompt.tags.get(_MANIFEST, "{}")) if prompt is not None else {}
            entries = [(one["prompt"], str(one["version"])) for one in told.get("predictors", ()) if one["prompt"]]
        except Exception:  # whatever it is: the trace is more important than its links
            prompt, entries = None, []
        if prompt is None:
            self._missing[ref] = time.monotonic() + _FORGOTTEN
        else:
            self._refs[ref] = tuple(entries)
        return tuple(entries)


def tag_of(refs: Iterable[Ref]) -> str:
    """The tag of a trace that names these prompt versions."""
    return dumped([{"name": name, "version": version} for name, version in refs])
