"""`publish`: a program becomes an immutable, numbered version in MLflow."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import dspy

from dspy_prod.compat.dspy import is_compiled
from dspy_prod.context.current import mark_of
from dspy_prod.errors import ConfigError
from dspy_prod.privacy.unshown import unshown
from dspy_prod.registry.errors import RegistryError
from dspy_prod.registry.names import Reference, checked_name, predictor_prompt
from dspy_prod.registry.published import provenance
from dspy_prod.registry.published.manifest import (
    CHUNK,
    DIGEST,
    KIND,
    MANIFEST,
    METRICS,
    PREDICTOR,
    PROGRAM,
    Manifest,
    PredictorEntry,
    ProgramVersion,
    ensure_prompt,
    metrics_in,
    sha256,
    state_tags,
    version_of,
)
from dspy_prod.registry.published.rendering import Messages, Slots, chat_prompt, current_adapter, escaped, messages
from dspy_prod.registry.published.signatures import Field, fields_of
from dspy_prod.registry.published.states import LMSettings, dumped, prepared, to_text
from dspy_prod.registry.server import Server, server_at

_SHOWN: Final = ("parent", "adapter", "model", "dataset", "commit")
_log = logging.getLogger("dspy_prod")


@dataclass(frozen=True)
class _Part:
    """One predictor, ready to be published."""

    name: str
    state: str
    chat: Messages
    fields: tuple[Field, ...]
    settings: LMSettings

    @property
    def sha256(self) -> str:
        return sha256(self.state)

    @property
    def digest(self) -> str:
        return sha256(to_text([self.name, self.state, self.chat, self.fields, self.settings.config]))


def publish(
    program: dspy.Module,
    name: str,
    *,
    metrics: Mapping[str, float] | None = None,
    dataset: str | Sequence[Any] | None = None,
    message: str | None = None,
    parent: int | ProgramVersion | None = None,
    run_id: str | None = None,
    force: bool = False,
    tracking_uri: str | None = None,
) -> ProgramVersion:
    """Publish a program as the next version of `name`.

    MLflow shows, for each predictor, what the model receives from it under the adapter and LM in force here, with
    `{{field}}` for the inputs. What `load` restores is the exact state: instructions, field descriptions and demos.
    Code, tools and secrets are not part of it. Before anything is written, the state is restored on a copy and the
    prompts compared, byte for byte.

    A program with content that is already published is not published again: the existing version is returned, with
    new metrics added to it.

    Args:
        program: any DSPy program with at least one predictor.
        name: letters, digits, `-`, `_` and `.`.
        metrics: what was measured, by name.
        dataset: what it was measured on: a name, or the list of `dspy.Example` (their digest is recorded).
        message: a commit message.
        parent: the version it was made from; default: the one the program was loaded from, else the newest.
        run_id: the MLflow run it came from; default: the active run.
        force: make a new version of identical content too.
        tracking_uri: the MLflow store; default: MLflow's current one.

    Raises:
        ConfigError: the name or the program cannot be published; the message names what, and the remedy.
        RegistryUnavailableError: MLflow did not answer. No half-written version can be loaded; publish again.

    Example:
        ```python
        version = registry.publish(program, "triage", metrics={"accuracy": 0.91}, message="one demo")
        ```
    """
    tracking_uri = unshown(tracking_uri)
    checked_name(name)
    measured = _finite(metrics or {})
    parts = _parts(program)
    server = server_at(tracking_uri)
    active_run, experiment = provenance.active()
    if tracking_uri is not None:
        experiment = None  # it is another store's
    ensure_prompt(server, name, PROGRAM, experiment)
    digest = _digest(parts)
    newest: int | None = None
    for prompt in server.versions(name):
        newest = newest or int(prompt.version)
        if not force and prompt.tags.get(DIGEST) == digest:
            return _measured_again(server, name, int(prompt.version), measured)
    inline = len(parts) == 1 and len(parts[0].state) <= CHUNK
    manifest = Manifest(
        digest=digest,
        predictors=tuple(_entry(server, name, part, inline, experiment) for part in parts),
        model=", ".join(dict.fromkeys(part.settings.model for part in parts if part.settings.model)) or None,
        adapter=type(current_adapter()).__name__,
        settings={part.name: part.settings.config for part in parts},
        parent=_parent(parent, program, name, newest),
        commit=provenance.git_commit(),
        dataset=provenance.dataset_name(dataset),
        run_id=run_id or active_run,
        message=message,
        author=provenance.author(),
        dspy=dspy.__version__,
    )
    tags = {  # MLflow's page shows the first ones, and the others on demand
        **{f"dspy_prod_{key}": str(value) for key in _SHOWN if (value := getattr(manifest, key)) is not None},
        METRICS: json.dumps(measured, sort_keys=True),
        KIND: PROGRAM,
        DIGEST: digest,
        MANIFEST: manifest.to_text(),
        **(state_tags(parts[0].name, parts[0].state) if inline else {}),
    }
    template: Any = parts[0].chat if inline else _contents(name, manifest)
    config = parts[0].settings.model_config() if inline else None
    made = server.write(lambda client: client.create_prompt_version(name, template, message, tags, None, config))
    if manifest.run_id:
        _link(server, manifest.run_id, made)
    return version_of(made)


def published(server: Server, program: dspy.Module, name: str) -> ProgramVersion | None:
    """The version that has a program's content already, None when there is none; raises as `publish`."""
    digest = _digest(_parts(program))
    return next((version_of(found) for found in server.versions(name) if found.tags.get(DIGEST) == digest), None)


def _digest(parts: list[_Part]) -> str:
    return sha256(to_text([part.digest for part in parts]))


def _parts(program: Any) -> list[_Part]:
    predictors = program.named_predictors() if isinstance(program, dspy.Module) else []
    if not predictors:
        raise ConfigError(f"{type(program).__name__} has no predictors to publish; give a dspy.Module that has some")
    for name in _frozen(program):
        _log.warning("%s is frozen (_compiled): DSPy saves no state of it, and it is not published either", name)
    return [_part(name, predictor) for name, predictor in predictors]


def _frozen(program: Any, within: str = "self") -> Iterator[str]:
    """The modules in which DSPy would find predictors, were they not frozen.

    It looks into attributes, and lists and dicts there, but no deeper: what an optimizer leaves on its result, such as
    all programs that it tried (`candidate_programs`), is no part of the program.
    """
    for name, value in vars(program).items():
        held = {f".{name}": value}
        if isinstance(value, (list, tuple)):
            held = {f".{name}[{number}]": item for number, item in enumerate(value)}
        elif isinstance(value, dict):
            held = {f".{name}[{key!r}]": item for key, item in value.items()}
        for path, item in held.items():
            if isinstance(item, dspy.Module) and not isinstance(item, dspy.Predict):
                if not is_compiled(item):
                    yield from _frozen(item, within + path)
                elif item.predictors():
                    yield within + path


def _part(name: str, predictor: Any) -> _Part:
    adapter = current_adapter()
    slots = Slots(predictor.signature)
    sent = messages(predictor, adapter, slots)
    for typed in (False, True):
        state = dumped(name, predictor, typed_demos=typed)
        twin = type("Twin", (), {})()
        twin.__dict__.update(prepared(predictor, state, allow_unsafe=True))
        if _rendered(twin, adapter, slots) == sent:
            return _Part(
                name, state, chat_prompt(predictor, adapter), fields_of(predictor.signature),
                LMSettings.of(predictor, adapter),
            )  # fmt: skip
    raise ConfigError(
        f"the demos of predictor {name!r} hold values that {type(adapter).__name__} would render differently once "
        "they went through JSON; replace them by texts, numbers, lists, dicts, pydantic models or dspy types"
    )


def _rendered(twin: Any, adapter: Any, slots: Slots) -> Messages | None:
    """What a restored predictor would send; None when the adapter cannot even render it."""
    try:
        return messages(twin, adapter, slots)
    except Exception:  # a list of numbers where a tuple was, say
        return None


def _entry(server: Server, program: str, part: _Part, inline: bool, experiment: str | None) -> PredictorEntry:
    """The predictor's prompt version: a new one, or the newest one if nothing changed."""
    if inline:
        return PredictorEntry(part.name, None, None, part.sha256, part.fields)
    prompt = predictor_prompt(program, part.name)
    ensure_prompt(server, prompt, PREDICTOR, experiment)
    newest = next(server.versions(prompt), None)
    if newest is None or newest.tags.get(DIGEST) != part.digest:
        tags = {
            "dspy_prod_predictor": part.name, "dspy_prod_adapter": part.settings.adapter, KIND: PREDICTOR,
            DIGEST: part.digest, **state_tags(part.name, part.state),
        }  # fmt: skip
        config = part.settings.model_config()
        newest = server.write(
            lambda client: client.create_prompt_version(prompt, part.chat, part.name, tags, None, config)
        )
    return PredictorEntry(part.name, prompt, int(newest.version), part.sha256, part.fields)


def _measured_again(server: Server, name: str, version: int, metrics: dict[str, float]) -> ProgramVersion:
    found = server.prompt(Reference(name, version))
    if metrics:
        merged = json.dumps({**metrics_in(found), **metrics}, sort_keys=True)
        server.write(lambda client: client.set_prompt_version_tag(name, version, METRICS, merged))
        found = server.prompt(Reference(name, version))
    return version_of(found)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    for key, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"metrics={{{key!r}: {value!r}}}: a metric is a finite number; leave out what is unknown")
    return {str(key): float(value) for key, value in metrics.items()}


def _parent(given: int | ProgramVersion | None, program: Any, name: str, newest: int | None) -> int | None:
    if given is not None:
        return given.version if isinstance(given, ProgramVersion) else int(given)
    origin, _, version = (mark_of(program) or "").rpartition("/")
    return int(version) if origin == name else newest


def _contents(name: str, manifest: Manifest) -> str:
    """What MLflow shows for a program of several predictors."""
    lines = [f"The program {name} consists of {len(manifest.predictors)} predictors:", ""]
    for entry in manifest.predictors:
        inputs, outputs = (
            ", ".join(field.name for field in entry.fields if field.kind == kind) for kind in ("input", "output")
        )
        lines += [f"- {entry.name}: {inputs} -> {outputs}", f"  prompts:/{entry.prompt}/{entry.version}"]
    return escaped("\n".join(lines))


def _link(server: Server, run_id: str, prompt: Any) -> None:
    """Show the version on the run's page too; the version stands without that."""
    try:
        server.write(lambda client: client.link_prompt_version_to_run(run_id, prompt))
    except RegistryError as error:
        _log.warning("%s/%s is published, but not linked to run %s: %s", prompt.name, prompt.version, run_id, error)
