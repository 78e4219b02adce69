"""What a program version is: the manifest that ties the versions of its predictors' prompts together.

A program version is one version of the MLflow prompt that bears the program's name; its number is the program's. It
lists the predictors with their prompts, which are MLflow prompts of their own (`triage.classify`, version 3). A program
of a single predictor needs no list: its prompt itself is the version. Since one request creates a prompt version, a
program version exists entirely or not at all.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from dspy_prod.compat.mlflow import EXPERIMENTS
from dspy_prod.errors import ConfigError
from dspy_prod.registry.errors import RegistryError
from dspy_prod.registry.files import plain, read
from dspy_prod.registry.names import Reference, predictor_prompt
from dspy_prod.registry.published.signatures import Field
from dspy_prod.registry.server import AlreadyExistsError, Server

FORMAT: Final = 1
KIND: Final = "dspy_prod_kind"
PROGRAM, PREDICTOR, JOURNAL = "program", "predictor", "promotions"
MANIFEST: Final = "dspy_prod_manifest"
METRICS: Final = "dspy_prod_metrics"
DIGEST: Final = "dspy_prod_digest"
STATE: Final = "dspy_prod_state_"
CHUNK: Final = 60_000
MOST_CHUNKS: Final = 100
_SHARED: Final = ("parent", "commit", "dataset", "run_id", "model", "adapter", "message", "author", "digest")


@dataclass(frozen=True)
class PredictorEntry:
    """One predictor of a program version.

    Attributes:
        name: as in `named_predictors()`.
        prompt, version: the MLflow prompt version that holds it; None when the program version itself does.
        sha256: digest of its state.
        fields: its signature.
    """

    name: str
    prompt: str | None
    version: int | None
    sha256: str
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of a program version, apart from its number and its metrics."""

    digest: str
    predictors: tuple[PredictorEntry, ...]
    model: str | None
    adapter: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    parent: int | None = None
    commit: str | None = None
    dataset: str | None = None
    run_id: str | None = None
    message: str | None = None
    author: str | None = None
    dspy: str | None = None

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps({"format": FORMAT, **plain(self)}, sort_keys=True)

    @classmethod
    def of(cls, text: str, where: object = "a program version") -> Manifest:
        """Read it back; a RegistryError when a later version of this library wrote it, or something else did."""
        if read(_Format, text, f"the manifest of {where}").format != FORMAT:
            raise RegistryError(f"a newer dspy_prod published {where}; upgrade dspy_prod to load it")
        return read(cls, text, f"the manifest of {where}")


@dataclass(frozen=True)
class _Format:
    format: int


@dataclass(frozen=True)
class ProgramVersion:
    """A published version of a program. Immutable, but for `metrics` and `aliases`, which are as they were when asked.

    Attributes:
        name: the program.
        version: its number, 1, 2, 3, ...
        uri: `prompts:/triage/3`, where MLflow shows it.
        aliases: what pointed to it: `production`, `staging`, ...
        metrics: what was measured, by name.
        parent: the version it was made from, None for the first.
        created_at: when it was published, in UTC.
        predictors: the URI of each predictor's MLflow prompt version, by the predictor's name.
        commit: git commit of the code, with `-dirty` when files had changed.
        dataset: what the metrics were measured on: a name, or digest and size of the examples.
        run_id: the MLflow run it came from.
        model: the model it was published with.
        adapter: class of the DSPy adapter it was published with.
        message: the commit message.
        author: who published it.
        digest: SHA-256 of the content; equal content has equal digests.

    Example:
        ```python
        version = registry.versions("triage")[0]
        print(version.name, version.version, version.metrics)
        ```
    """

    name: str
    version: int
    uri: str
    aliases: tuple[str, ...]
    metrics: Mapping[str, float]
    parent: int | None
    created_at: dt.datetime
    predictors: Mapping[str, str]
    commit: str | None
    dataset: str | None
    run_id: str | None
    model: str | None
    adapter: str
    message: str | None
    author: str | None
    digest: str

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(plain(self))


def reference_to(name: str, version: int | str | ProgramVersion) -> Reference:
    """What a number, a reference, or a version itself means among the versions of a program."""
    if isinstance(version, ProgramVersion):
        return Reference(version.name, version.version)
    if isinstance(version, str) and not version.isdigit():
        return Reference.of(version)
    return Reference(name, int(version))


def named(name: str, version: int | str | ProgramVersion) -> int | str | ProgramVersion:
    """The same, once an alias may stand for itself: `production` for `triage@production`."""
    bare = isinstance(version, str) and not version.isdigit() and "@" not in version and "/" not in version
    return f"{name}@{version}" if bare else version


def is_program(prompt: Any) -> bool:
    """Whether an MLflow prompt version is a program version."""
    return bool(prompt.tags.get(KIND) == PROGRAM)


def manifest_in(prompt: Any, where: object) -> Manifest:
    """The manifest in an MLflow prompt version; a RegistryError when it is no program version, or was tampered with."""
    if not is_program(prompt):
        raise RegistryError(f"{where} is an MLflow prompt, but no program that dspy_prod published")
    exact = f"{prompt.name}/{prompt.version}"
    manifest = Manifest.of(prompt.tags.get(MANIFEST, ""), exact)
    for entry in manifest.predictors:
        own = (None, None) if entry.prompt is None else (predictor_prompt(prompt.name, entry.name), entry.version)
        if (entry.prompt, entry.version) != own or (entry.prompt is None) != (entry.version is None):
            raise RegistryError(
                f"the manifest of {exact} was changed in MLflow after dspy_prod wrote it, and cannot be used: "
                f"predictor {entry.name!r} stands in a prompt of another program, or in none"
            )
    return manifest


def metrics_in(prompt: Any) -> dict[str, float]:
    """What was measured of an MLflow prompt version; a RegistryError when it cannot be read."""
    return read(dict[str, float], prompt.tags.get(METRICS, "{}"), f"the metrics of {prompt.name}/{prompt.version}")


def version_of(prompt: Any, aliases: tuple[str, ...] | None = None) -> ProgramVersion:
    """The program version that an MLflow prompt version is; a RegistryError when it is none."""
    manifest = manifest_in(prompt, f"{prompt.name}/{prompt.version}")
    own = f"prompts:/{prompt.name}/{prompt.version}"
    return ProgramVersion(
        name=prompt.name,
        version=int(prompt.version),
        uri=own,
        aliases=tuple(sorted(prompt.aliases or ())) if aliases is None else aliases,
        metrics=MappingProxyType(metrics_in(prompt)),
        created_at=dt.datetime.fromtimestamp(prompt.creation_timestamp / 1000, dt.timezone.utc),
        predictors=MappingProxyType(
            {e.name: own if e.prompt is None else f"prompts:/{e.prompt}/{e.version}" for e in manifest.predictors}
        ),
        **{name: getattr(manifest, name) for name in _SHARED},
    )


def ensure_prompt(server: Server, prompt: str, kind: str, experiment: str | None = None) -> None:
    """Make an MLflow prompt of a kind unless it exists; a ConfigError when something else has its name.

    With the id of an experiment, MLflow lists it on that one's page too.
    """
    found = server.read(lambda client: client.get_prompt(prompt))
    if found is None:
        try:
            listed = {EXPERIMENTS: f",{experiment},"} if experiment else {}
            server.write(lambda client: client.create_prompt(prompt, None, {KIND: kind, **listed}))
            return
        except AlreadyExistsError:  # somebody was faster, or it is a registered model
            found = server.read(lambda client: client.get_prompt(prompt))
    other = "a registered model" if found is None else found.tags.get(KIND, "a prompt of your own")
    if other != kind:
        raise ConfigError(f"MLflow already uses the name {prompt!r} for {other}; publish the program by another name")


def sha256(text: str) -> str:
    """The digest of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def state_tags(name: str, text: str) -> dict[str, str]:
    """A state as tags of a prompt version: one, or several when it is large, within a bound (ConfigError)."""
    if len(text) > CHUNK * MOST_CHUNKS:
        raise ConfigError(
            f"the state of predictor {name!r} has {len(text)} characters, the registry holds {CHUNK * MOST_CHUNKS}; "
            "use fewer demos, or refer to images and documents by URL"
        )
    chunks = [text[at : at + CHUNK] for at in range(0, len(text), CHUNK)]
    return {f"{STATE}{number}": chunk for number, chunk in enumerate(chunks)}


def state_in(tags: Mapping[str, str], expected: str, where: str) -> str:
    """The state that `state_tags` wrote; a RegistryError when somebody changed or deleted tags."""
    parts: list[str] = []
    while (chunk := tags.get(f"{STATE}{len(parts)}")) is not None:
        parts.append(chunk)
    text = "".join(parts)
    if sha256(text) != expected:
        raise RegistryError(f"the state in {where} was changed after it was published; publish the program again")
    return text
