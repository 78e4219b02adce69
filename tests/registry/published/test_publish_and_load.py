"""What is published is loaded again, byte for byte; MLflow shows what the model receives."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import mlflow
import pytest
from mlflow import MlflowClient

import dspy_prod
from dspy_prod import ConfigError, registry
from dspy_prod.testing import ScriptedEngine
from tests.registry.inverses import unescaped
from tests.registry.programs import Looking, Nested, Sort, Ticket, agent, looking, nested, qa, search, thinking

INPUT = "what the user says {{x}}"

PROGRAMS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "predict": (qa, lambda: dspy.Predict("question, context: list[str] -> answer")),
    "chain of thought": (thinking, lambda: dspy.ChainOfThought(Sort)),
    "react": (agent, lambda: dspy.ReAct("question -> answer: float", tools=[search])),
    "pictures": (looking, Looking),
    "nested": (nested, Nested),
}
ADAPTERS = [dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()]


def sent(program: Any) -> dict[str, Any]:
    """What each predictor of a program would send."""
    adapter = dspy.settings.adapter or dspy.ChatAdapter()
    found = {}
    for name, predictor in program.named_predictors():
        inputs = {
            key: dspy.History(messages=[]) if info.annotation == dspy.History else INPUT
            for key, info in predictor.signature.input_fields.items()
        }
        found[name] = adapter.format(predictor.signature, predictor.demos, inputs)
    return found


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: type(adapter).__name__)
@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_loaded_program_sends_what_was_published(store: str, kind: str, adapter: Any) -> None:
    """Every predictor's messages are equal byte for byte, and the state is equal when published again."""
    make, bare = PROGRAMS[kind]
    with dspy.context(adapter=adapter):
        program = make()
        version = registry.publish(program, "it")
        loaded = registry.load("it/1", bare())
        assert sent(loaded) == sent(program)
        assert sent(loaded) != sent(bare())
        assert registry.publish(loaded, "it").version == version.version == 1


def test_demos_stay_what_they_are(store: str) -> None:
    """A dict stays a dict, an Example an Example with its input keys."""
    registry.publish(qa(), "it")
    loaded = registry.load("it/1", dspy.Predict("question, context: list[str] -> answer"))
    assert [type(demo) for demo in loaded.demos] == [dict, dspy.Example, dspy.Example]
    assert loaded.demos == qa().demos
    assert set(loaded.demos[1].inputs().keys()) == {"question", "context"}
    assert loaded.demos[1].augmented is True


def test_a_program_of_one_predictor_is_one_readable_prompt(store: str, client: MlflowClient) -> None:
    """MLflow shows system message, demos and user turn, and finds the inputs and nothing else as variables."""
    program = qa()
    version = registry.publish(program, "it", message="first")
    prompt = client.get_prompt_version("it", 1)
    assert prompt.variables == {"question", "context"}
    assert not prompt.is_text_prompt
    assert [message["role"] for message in prompt.template] == ["system", *["user", "assistant"] * 3, "user"]
    filled = prompt.format(question=INPUT, context=INPUT)
    assert [{**message, "content": unescaped(message["content"])} for message in filled] == sent(program)["self"]
    assert prompt.commit_message == "first"
    assert version.predictors == {"self": "prompts:/it/1"}
    assert [prompt.name for prompt in client.search_prompts()] == ["it"]


def test_a_program_of_several_predictors_has_one_version_and_a_prompt_for_each(
    store: str, client: MlflowClient
) -> None:
    """The program's own prompt lists the others; only changed predictors get a new prompt version."""
    program = nested()
    first = registry.publish(program, "it")
    assert list(first.predictors) == [name for name, _ in program.named_predictors()]
    assert first.predictors["sort"] == "prompts:/it.sort/1"
    assert len(set(first.predictors.values())) == len(first.predictors)
    assert "prompts:/it.inner.look/1" in client.get_prompt_version("it", 1).template
    program.inner.look.demos = []
    second = registry.publish(program, "it")
    assert (second.version, second.parent) == (2, 1)
    changed = {name for name in first.predictors if first.predictors[name] != second.predictors[name]}
    assert changed == {"inner.look"}
    assert sent(registry.load("it/1", Nested())) == sent(nested())
    assert sent(registry.load("prompts:/it/2", Nested())) == sent(program)


def test_publishing_the_same_again_gives_the_same_version_unless_forced(store: str) -> None:
    """Identical content is one version; new measurements are added to it."""
    first = registry.publish(qa(), "it", metrics={"accuracy": 0.5, "cost": 1})
    again = registry.publish(qa(), "it", metrics={"accuracy": 0.6})
    assert (again.version, dict(again.metrics)) == (1, {"accuracy": 0.6, "cost": 1.0})
    forced = registry.publish(qa(), "it", force=True)
    assert (forced.version, forced.parent, forced.digest) == (2, 1, first.digest)


def test_a_version_says_where_it_comes_from(store: str, tmp_path: Path) -> None:
    """Metrics, dataset, parent, model, run, author and message are part of a version."""
    lm = dspy_prod.LM("openai/gpt-4o-mini", temperature=0.3, max_tokens=50, api_key="sk-1", store="memory://registry")
    examples = [dspy.Example(question=str(n), answer="a").with_inputs("question") for n in range(3)]
    with dspy.context(lm=lm), mlflow.start_run() as run:
        version = registry.publish(qa(), "it", metrics={"accuracy": 0.91}, dataset=examples, message="why")
    assert version.metrics == {"accuracy": 0.91}
    assert version.dataset is not None
    assert version.dataset.endswith("(3 examples)")
    assert (version.model, version.adapter, version.message) == ("openai/gpt-4o-mini", "ChatAdapter", "why")
    assert (version.run_id, version.parent) == (run.info.run_id, None)
    assert version.author is not None
    linked = MlflowClient().get_run(run.info.run_id).data.tags["mlflow.linkedPrompts"]
    assert json.loads(linked) == [{"name": "it", "version": "1"}]
    assert [prompt.name for prompt in MlflowClient().search_prompts("experiment_id = '0'")] == ["it"]
    shown = MlflowClient().get_prompt_version("it", 1)
    assert shown.model_config == {
        "provider": "openai", "model_name": "gpt-4o-mini", "temperature": 0.3, "max_tokens": 50
    }  # fmt: skip
    assert shown.tags["dspy_prod_adapter"] == "ChatAdapter"
    changed = registry.publish(qa(), "it", dataset="dev-set")
    assert (changed.version, changed.dataset, changed.parent, changed.run_id) == (2, "dev-set", 1, None)


def test_the_parent_of_what_was_loaded_is_what_was_loaded(store: str) -> None:
    """A program that was loaded and changed descends from the version it was loaded from."""
    program = qa()
    for number in range(3):
        program.demos = program.demos[number:]
        registry.publish(program, "it")
    loaded = registry.load("it/1", dspy.Predict("question, context: list[str] -> answer"))
    loaded.demos = loaded.demos[:1]
    assert registry.publish(loaded, "it").parent == 1


def test_no_secret_reaches_mlflow(store: str, database: Path) -> None:
    """Keys, headers and passwords in addresses are in no table of the store and in no copy on disk."""
    secrets = ["sk-secret-key-one", "sk-secret-key-two", "secret-header", "secret-password"]
    ours = dspy_prod.LM(
        "openai/gpt-4o-mini", api_key=secrets[0], api_base=f"https://user:{secrets[3]}@example.com/v1",
        extra_headers={"X-Token": secrets[2]}, store="memory://registry-secrets",
    )  # fmt: skip
    theirs = dspy.LM("openai/gpt-4o", api_key=secrets[1], api_base=f"https://user:{secrets[3]}@example.com/v1")
    program = nested()
    program.sort.lm, program.steps[0].lm = ours, theirs
    program.steps[0].config = {"api_key": secrets[0], "temperature": 0.5}
    with dspy.context(lm=ours):
        registry.publish(program, "it")
    registry.load("it/1", Nested())
    written = database.read_bytes() + b"".join(path.read_bytes() for path in Path(".dspy_prod").rglob("*.json"))
    assert b"gpt-4o-mini" in written
    assert [secret for secret in secrets if secret.encode() in written] == []


def test_an_lm_that_a_predictor_has_is_kept_and_a_plain_one_is_rebuilt(store: str) -> None:
    """The state of a predictor's own LM comes back without key and address, unless the program brings its own."""
    program = qa()
    program.lm = dspy.LM("openai/gpt-4o", api_key="sk-secret", api_base="https://example.com", temperature=0.5)
    registry.publish(program, "it")
    bare = dspy.Predict("question, context: list[str] -> answer")
    loaded = registry.load("it/1", bare)
    assert (loaded.lm.model, loaded.lm.kwargs["temperature"]) == ("openai/gpt-4o", 0.5)
    assert "api_base" not in loaded.lm.kwargs
    mine = dspy_prod.LM("any/model", engine=ScriptedEngine(), store="memory://registry-mine")
    other = dspy.Predict("question, context: list[str] -> answer")
    other.lm = mine
    assert registry.load("it/1", other).lm is mine


def test_a_custom_lm_is_rebuilt_only_for_those_who_trust_the_registry(
    store: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A state that names a class is not imported by default; the load still works, and says so."""
    program = qa()
    program.lm = dspy_prod.LM("openai/gpt-4o", store="memory://registry-custom", temperature=0.2)
    registry.publish(program, "it")
    assert registry.load("it/1", dspy.Predict("question, context: list[str] -> answer")).lm is None
    assert "allow_unsafe_lm_state" in caplog.text
    loaded = registry.load("it/1", dspy.Predict("question, context: list[str] -> answer"), allow_unsafe_lm_state=True)
    assert isinstance(loaded.lm, dspy_prod.LM)
    assert loaded.lm.kwargs["temperature"] == 0.2


def test_an_engine_that_cannot_be_saved_does_not_stop_a_publication(store: str) -> None:
    """The model's name is recorded then."""
    program = qa()
    program.lm = dspy_prod.LM("any/model", engine=ScriptedEngine(), store="memory://registry-engine")
    assert registry.publish(program, "it").model == "any/model"


def test_a_large_state_is_kept_exactly(store: str, client: MlflowClient) -> None:
    """Demos of a megabyte are loaded byte for byte, and MLflow's page is shortened with a note."""
    program = qa()
    program.demos = [{"question": f"{n} ü {{{{q}}}}", "context": ["x" * 5000], "answer": "é" * 200} for n in range(200)]
    registry.publish(program, "it")
    loaded = registry.load("it/1", dspy.Predict("question, context: list[str] -> answer"))
    assert sent(loaded) == sent(program)
    shown = client.get_prompt_version("it.self", 1)
    assert shown.variables == {"question", "context"}
    assert "too long to be shown" in shown.template[1]["content"]


def test_what_would_not_come_back_is_refused_before_anything_is_written(store: str, client: MlflowClient) -> None:
    """A demo that JSON would change is named, and no prompt exists afterwards."""
    program = qa()
    program.demos = [{"question": ("a", "tuple"), "context": [], "answer": "x"}]
    with pytest.raises(ConfigError, match=r"demos of predictor 'self'.*ChatAdapter"):
        registry.publish(program, "it")
    assert list(client.search_prompts()) == []


@pytest.mark.parametrize(
    ("bare", "predictor", "field", "words"),
    [
        (
            lambda: dspy.Predict("question, context: list[int] -> answer"),
            "self",
            "context",
            r"list\[str\].*list\[int\]",
        ),
        (lambda: dspy.Predict("question, context: list[str] -> reply"), "self", "answer", "missing"),
        (lambda: dspy.Predict("question, context: list[str], more -> answer"), "self", "more", "was not part"),
        (lambda: dspy.Predict("context: list[str], question -> answer"), "self", "context", "moved"),
        (lambda: dspy.ChainOfThought("question, context: list[str] -> answer"), "self", None, "missing"),
    ],
)
def test_a_changed_signature_is_refused_and_named(
    store: str, bare: Callable[[], Any], predictor: str, field: str | None, words: str
) -> None:
    """The error tells the predictor and the field, and the program is left as it was."""
    registry.publish(qa(), "it")
    program = bare()
    before = sent(program)
    with pytest.raises(registry.SignatureMismatchError, match=words) as caught:
        registry.load("it/1", program)
    assert (caught.value.predictor, caught.value.field) == (predictor, field)
    assert sent(program) == before


def test_a_changed_model_inside_a_signature_is_a_changed_signature(store: str) -> None:
    """A field added to a pydantic model changes the prompt, so it does not fit what was published."""
    registry.publish(thinking(), "it")

    class Longer(Ticket):
        urgent: bool

    Longer.__name__ = "Ticket"
    changed = dspy.ChainOfThought(Sort.with_updated_fields("ticket", type_=Longer))
    with pytest.raises(registry.SignatureMismatchError, match="urgent: bool"):
        registry.load("it/1", changed)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a@b", "prompts:/a", "ü", "x" * 126])
def test_a_name_that_mlflow_does_not_take_is_refused(store: str, name: str) -> None:
    """The error says which characters are allowed, or how long a name may be."""
    with pytest.raises(ConfigError, match=r"letters, digits|non-empty|at most"):
        registry.publish(qa(), name)


@pytest.mark.parametrize("reference", ["it", "it/", "it@", "it/x", "it/1@production", "prompts:/it", 3])
def test_a_reference_that_names_no_version_is_refused(store: str, reference: Any) -> None:
    """The error shows both forms that do."""
    with pytest.raises(ConfigError, match=r"name@production.*name/3"):
        registry.load(reference, qa())


def test_a_name_that_mlflow_uses_for_something_else_is_refused(store: str, client: MlflowClient) -> None:
    """A prompt or a model of the user's own is not written over."""
    client.create_prompt("mine")
    client.create_registered_model("model")
    for name in ("mine", "model"):
        with pytest.raises(ConfigError, match="already uses the name"):
            registry.publish(qa(), name)
    registry.publish(nested(), "it")
    with pytest.raises(ConfigError, match="for predictor"):
        registry.publish(qa(), "it.sort")


def test_what_does_not_exist_is_told_apart_from_a_server_that_is_down(store: str) -> None:
    """An unknown program, version or alias is no reason to serve an old copy."""
    registry.publish(qa(), "it")
    for reference in ("other/1", "it/2", "it@production"):
        with pytest.raises(registry.UnknownVersionError):
            registry.load(reference, qa())


def test_a_publication_that_breaks_off_leaves_no_version(
    store: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program's version is written last: after a crash there is nothing to load, and publishing goes on."""
    original = MlflowClient.create_prompt_version

    def crash(self: Any, name: str, *arguments: Any, **more: Any) -> Any:
        if name == "it":
            raise KeyboardInterrupt
        return original(self, name, *arguments, **more)

    monkeypatch.setattr(MlflowClient, "create_prompt_version", crash)
    with contextlib.suppress(KeyboardInterrupt):
        registry.publish(nested(), "it")
    assert list(client.search_prompt_versions("it")) == []
    assert len(client.search_prompt_versions("it.sort")) == 1
    monkeypatch.undo()
    mlflow.set_tracking_uri(store)
    assert registry.publish(nested(), "it").predictors["sort"] == "prompts:/it.sort/1"


def test_a_state_that_was_changed_by_hand_is_not_loaded(store: str, client: MlflowClient) -> None:
    """The digest in the manifest tells."""
    registry.publish(qa(), "it")
    client.set_prompt_version_tag("it", "1", "dspy_prod_state_0", "{}")
    with pytest.raises(registry.RegistryError, match="changed after it was published"):
        registry.load("it/1", qa())


def test_a_directory_of_files_is_refused(store: str, tmp_path: Path) -> None:
    """The error names SQLite."""
    for uri in ("./mlruns", f"file://{tmp_path}/mlruns"):
        with pytest.raises(ConfigError, match="sqlite:///"):
            registry.publish(qa(), "it", tracking_uri=uri)


def test_a_program_without_predictors_is_refused(store: str) -> None:
    """There is nothing to publish."""

    class Empty(dspy.Module):  # type: ignore[misc]
        def forward(self) -> None: ...

    with pytest.raises(ConfigError, match="no predictors"):
        registry.publish(Empty(), "it")


def test_a_metric_is_a_finite_number(store: str) -> None:
    """NaN is no measurement."""
    with pytest.raises(ConfigError, match="finite"):
        registry.publish(qa(), "it", metrics={"accuracy": float("nan")})


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_the_code_is_recorded(store: str, tmp_path: Path) -> None:
    """With a mark when files had changed since; outside a repository there is none."""
    assert registry.publish(qa(), "it").commit is None

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        done = subprocess.run(("git", *identity, *arguments), cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    (tmp_path / "code.py").write_text("1")
    git("init")
    git("add", "code.py")
    git("commit", "-m", "first")
    assert registry.publish(qa(), "it", force=True).commit == git("rev-parse", "HEAD")
    (tmp_path / "code.py").write_text("2")
    assert registry.publish(qa(), "it", force=True).commit == f"{git('rev-parse', 'HEAD')}-dirty"


def test_importing_the_registry_imports_no_mlflow() -> None:
    """MLflow takes seconds to import; it is needed only when a store is asked."""
    code = (
        "import sys, dspy_prod; from dspy_prod.registry import publish, load, promote, Gate, diff, versions;"
        "import dspy_prod.registry.published.follow;"
        "print([name for name in ('mlflow', 'litellm') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_a_wrapped_program_is_published_as_itself(store: str) -> None:
    """A `Production` is transparent: what is published from it loads into the bare program, and the other way round."""
    program = dspy_prod.Production(nested(), name="any")
    version = registry.publish(program, "it")
    assert registry.publish(nested(), "it").version == version.version
    assert sent(registry.load("it/1", Nested())) == sent(registry.load("it/1", dspy_prod.Production(Nested())))


def test_decision_settings_and_field_descriptions_come_back(store: str) -> None:
    """All that an optimizer may change about a predictor is restored."""
    program = dspy.Predict("question -> sure: bool")
    program.signature = program.signature.with_updated_fields("sure", desc="{{certain}}?", prefix="Sure:")
    program.fields = {"sure": {"threshold": 0.7}}
    registry.publish(program, "it")
    loaded = registry.load("it/1", dspy.Predict("question -> sure: bool"))
    assert loaded.fields == {"sure": {"threshold": 0.7}}
    assert loaded.signature.fields["sure"].json_schema_extra["desc"] == "{{certain}}?"
    assert loaded.dump_state() == program.dump_state()
