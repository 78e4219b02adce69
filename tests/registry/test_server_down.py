"""MLflow may be slow, down or gone: a program is loaded from the last good copy within seconds."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import dspy
import pytest
from mlflow import MlflowClient

import dspy_prod
from dspy_prod import registry
from dspy_prod.registry.files import write
from tests.ports import free_port
from tests.registry.processes import MlflowServer, Other, forget
from tests.registry.programs import Nested, nested, qa
from tests.registry.published.test_publish_and_load import sent
from tests.stopwatch import Stopwatch


def bare() -> dspy.Predict:
    return dspy.Predict("question, context: list[str] -> answer")


def names(events: list[dspy_prod.Event]) -> list[str]:
    return [event.name for event in events]


def test_a_real_server_and_then_none(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: list[dspy_prod.Event]
) -> None:
    """Published and loaded over HTTP; with the server killed or mute, served from memory, then from disk."""
    monkeypatch.chdir(tmp_path)
    program = nested()
    version = registry.publish(program, "it", tracking_uri=server.uri)
    assert str(version) == "it/1"

    def load(**more: Any) -> tuple[Any, float]:
        with Stopwatch() as took:
            loaded = registry.load("it/1", Nested(), tracking_uri=server.uri, **more)
        return loaded, took.seconds

    assert sent(load()[0]) == sent(program)
    forget()
    server.freeze()
    loaded, took = load()
    assert sent(loaded) == sent(program)
    assert took < 8
    server.kill()
    forget()
    loaded, took = load()
    assert sent(loaded) == sent(program)
    assert took < 3
    assert names(events) == ["registry_stale"] * 2
    assert events[-1].data["version"] == "it/1"
    assert events[-1].data["age"] >= 0
    with pytest.raises(registry.RegistryUnavailableError, match="no copy of it/2"):
        registry.load("it/2", Nested(), tracking_uri=server.uri)


def nowhere() -> str:
    """The address of a server that is not there."""
    return f"http://127.0.0.1:{free_port()}"


def with_copy(store: str, tmp_path: Path) -> tuple[str, Path]:
    """A dead address, and the copy that an earlier process left for it."""
    registry.publish(qa(), "it")
    registry.load("it/1", bare())
    (path,) = (tmp_path / ".dspy_prod" / "registry").glob("*.json")
    uri = nowhere()
    key = registry.published.loading.copies.file_of((uri, "it/1"), None)
    os.rename(path, key)
    forget()
    return uri, tmp_path / key


def test_a_new_process_starts_from_the_copy_on_disk(store: str, tmp_path: Path, others: tuple[Other, Other]) -> None:
    """A process that never saw the server alive gets its program, within seconds."""
    uri, _ = with_copy(store, tmp_path)
    code = (
        "import os, sys, dspy, dspy_prod\n"
        "os.chdir(sys.argv[2])\n"
        "remove = dspy_prod.add_listener(lambda event: print(event.name))\n"
        "program = dspy_prod.registry.load('it/1', dspy.Predict('question, context: list[str] -> answer'),"
        " tracking_uri=sys.argv[1])\n"
        "remove()\n"
        "print(len(program.demos))"
    )
    assert others[0].run(code, uri, str(tmp_path)) == ["registry_stale", "3"]


def test_a_copy_is_for_its_owner_only_and_whole(store: str, tmp_path: Path) -> None:
    """Nobody else reads it, and no temporary file is left."""
    _, path = with_copy(store, tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o077 == 0
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["", "{", "{}", "changed"])
def test_a_damaged_copy_is_not_believed(store: str, tmp_path: Path, damage: str) -> None:
    """A copy whose digest is wrong is as good as none."""
    uri, path = with_copy(store, tmp_path)
    content = json.loads(path.read_text())
    content["release"] = content["release"].replace("Use the context", "Use no context")
    path.write_text(json.dumps(content) if damage == "changed" else damage)
    with pytest.raises(registry.RegistryUnavailableError, match="holds no copy"):
        registry.load("it/1", bare(), tracking_uri=uri)


def test_a_copy_in_memory_is_used_for_a_bounded_time(store: str, tmp_path: Path, database: Path) -> None:
    """Within `max_age` MLflow is not asked again, whatever others move there; then it is, and what it says holds."""
    program = qa()
    registry.publish(program, "it")
    registry.promote("it", 1)
    registry.load("it@production", bare())
    program.demos = []
    registry.publish(program, "it")
    MlflowClient(tracking_uri=store, registry_uri=store).set_prompt_alias("it", "production", 2)
    assert len(registry.load("it@production", bare()).demos) == 3
    assert len(registry.load("it@production", bare(), max_age=0).demos) == 0
    with pytest.raises(dspy_prod.ConfigError, match="max_age"):
        registry.load("it@production", bare(), max_age=-1)


def test_a_disk_that_cannot_be_written_does_not_stop_a_load(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The copy is a precaution, no condition."""
    registry.publish(qa(), "it")
    (tmp_path / ".dspy_prod").write_text("not a directory")
    assert len(registry.load("it/1", bare()).demos) == 3
    assert "cannot be written" in caplog.text


def test_a_copy_that_others_could_write_is_closed_to_them(store: str, tmp_path: Path) -> None:
    """Its digest is written in it: whoever may write the file chooses the prompts."""
    uri, path = with_copy(store, tmp_path)
    path.chmod(0o666)
    path.parent.chmod(0o777)
    registry.load("it/1", bare(), tracking_uri=uri)
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path, path.parent)] == [0o600, 0o755]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
@pytest.mark.parametrize("which", ["file", "directory"])
def test_somebody_else_s_copy_is_not_believed(store: str, tmp_path: Path, which: str) -> None:
    """Prompts that a stranger left in a directory were served whenever MLflow was down."""
    uri, path = with_copy(store, tmp_path)
    os.chown(path if which == "file" else path.parent, 54_321, -1)
    with pytest.raises(registry.RegistryUnavailableError, match="holds no copy"):
        registry.load("it/1", bare(), tracking_uri=uri)


def test_directories_above_a_copy_are_for_their_owner_only(tmp_path: Path) -> None:
    """With a umask of 0, everybody could put another store into `.dspy_prod`, because the registry had made it."""
    before = os.umask(0)
    try:
        write(tmp_path / "a" / "b" / "copy.json", "{}")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / each).stat().st_mode) for each in ("a", "a/b")] == [0o700, 0o700]
