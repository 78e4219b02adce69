"""What `deploy` and its command take, refuse and print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dspy
import pytest
from mlflow import MlflowClient

from dspy_prod import ConfigError, registry
from dspy_prod.cli import main
from dspy_prod.registry import Deployment, deploy
from tests.registry.aliases.test_promotion import aliases, publish
from tests.registry.deploying import STAGES, Bench, everywhere
from tests.registry.programs import nested, qa


def bare() -> dspy.Predict:
    return dspy.Predict("question, context: list[str] -> answer")


def good(program: Any) -> list[float]:
    """An evaluation that everything passes."""
    return [1.0, 0.9]


def test_a_program_is_deployed_as_it_is(store: str, client: MlflowClient, tmp_path: Path) -> None:
    """In Python: gated, published and promoted; the answer says what happened, also the second time."""
    found = deploy("it", qa(), evaluate=good, thresholds={"score": 0.9}, report_dir=None, by="ada")
    assert isinstance(found, Deployment)
    assert (found.outcome, found.version, found.by, found.files, found.resumed) == ("deployed", 1, "ada", (), False)
    assert found.gate is not None
    assert found.gate.metrics == {"score": 0.95}
    assert str(found) == "it/1: deployed"
    assert aliases(client) == everywhere(1)
    again = deploy("it", qa(), evaluate=good, thresholds={"score": 0.9}, report_dir=tmp_path / "reports")
    assert (again.outcome, again.id, again.resumed) == ("unchanged", found.id, True)
    assert [Path(each).name for each in again.files] == ["deployment-it-1.json", "deployment-it-1.md"]
    assert json.loads(Path(again.files[0]).read_text()) == json.loads(json.dumps(again.to_dict()))


@pytest.mark.parametrize("name", ["version", "number", "alias", "reference", "path"])
def test_a_candidate_is_named_in_many_ways(store: str, client: MlflowClient, name: str) -> None:
    """A `ProgramVersion`, a number, an alias, a reference, or a `Path`."""
    program = qa()
    program.demos = program.demos[:1]  # a dict: a file that DSPy writes does not tell dicts from examples
    version = registry.publish(program, "it")
    registry.promote("it", 1, alias="dev")
    program.save("saved.json")
    candidates = {"version": version, "number": 1, "alias": "dev", "reference": "it@dev", "path": Path("saved.json")}
    found = deploy("it", candidates[name], evaluate=good, thresholds={"score": 0.9}, program=bare)
    assert (found.outcome, found.version) == ("deployed", 1)


def test_errors_carry_the_deployment_so_far(store: str) -> None:
    """With the report and the advice."""
    publish(1)
    with pytest.raises(registry.PromotionRefusedError, match="it/1 was not promoted to staging") as caught:
        deploy("it", 1, evaluate=lambda program: {}, thresholds={"score": 1}, program=bare())
    assert caught.value.deployment is not None
    assert caught.value.deployment.outcome == "inconclusive"
    assert "force=True" in caught.value.deployment.advice[0]
    assert Path(caught.value.deployment.files[1]).read_text().startswith("# Deployment of it/1: inconclusive")


def test_an_interrupted_evaluation_is_reported_too(store: str, client: MlflowClient) -> None:
    """Ctrl-C in the gate leaves a report, and nothing moved."""
    publish(1)

    def stop(program: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deploy("it", 1, evaluate=stop, thresholds={"score": 1}, program=bare, report_dir="reports")
    report = json.loads(Path("reports/deployment-it-1.json").read_text())
    assert (report["outcome"], report["error"]) == ("interrupted", "KeyboardInterrupt")
    assert aliases(client) == {}


def test_a_report_that_cannot_be_written_undoes_nothing(
    store: str, client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told; the deployment is what it is."""
    publish(1)
    (tmp_path / "file").write_text("no folder")
    found = deploy("it", 1, evaluate=good, thresholds={"score": 0}, program=bare, report_dir="file/reports")
    assert (found.outcome, found.files) == ("deployed", ())
    assert "cannot be written" in caplog.text
    assert aliases(client) == everywhere(1)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"stages": ()}, "at least one"),
        ({"stages": "staging"}, "at least one"),
        ({"stages": ("staging", "staging")}, "none twice"),
        ({"stages": ("previous",)}, "by itself"),
        ({"stages": ("a b",)}, "letters"),
        ({"force": True}, "reason="),
        ({"thresholds": None}, "checks nothing"),
        ({"program": None}, "program="),
        ({"program": dict}, "program="),
        ({"candidate": 1.5}, "version number"),
        ({"candidate": "nowhere.json"}, "no file nowhere.json"),
        ({"candidate": "state.pkl"}, "JSON"),
        ({"candidate": "broken.json"}, "does not fit"),
        ({"candidate": "other.json"}, "does not fit"),
        ({"candidate": "other@production"}, "not of 'it'"),
    ],
)
def test_impossible_arguments_are_refused(store: str, more: dict[str, Any], words: str) -> None:
    """Before anything is evaluated, by name."""
    publish(1)
    Path("broken.json").write_text("{")
    nested().save("other.json")
    arguments = {"candidate": 1, "thresholds": {"score": 1}, "program": bare, **more}
    with pytest.raises(ConfigError, match=words):
        deploy("it", evaluate=lambda program: pytest.fail("evaluated"), **arguments)
    assert registry.history("it") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--candidate", "7"], "not found"),
        (["--candidate", "canary"], "not found"),
        (["--candidate", "1", "--tracking-uri", "http://127.0.0.1:9"], "cannot be reached"),
        (["--candidate", "1", "--stages", "a b"], "letters"),
        (["--candidate", "1", "--eval", "nowhere.py"], "takes a Python file such as"),
    ],
)
def test_other_errors_have_an_exit_code_of_their_own(bench: Bench, arguments: list[str], words: str) -> None:
    """2, with one message, and nothing evaluated."""
    publish(1)
    assert bench.deploy(1, *arguments) == 2
    assert bench.err.startswith("dspy-prod deploy: ")
    assert words in bench.err
    assert bench.evaluations == []


def test_a_program_that_does_not_fit_is_refused_before_the_gate(bench: Bench) -> None:
    """The field is named."""
    registry.publish(dspy.Predict("question -> answer"), "it")
    assert bench.deploy(1) == 2
    assert "field 'context'" in bench.err
    assert bench.evaluations == []


def test_json_can_be_parsed_whatever_the_evaluation_prints(bench: Bench) -> None:
    """Also when the gate refuses; the words for people are on standard error."""
    publish(2)
    bench.finds(score=0)
    assert bench.deploy(1, "--json") == 1
    assert json.loads(bench.out)["outcome"] == "failed"
    assert "evaluating" in bench.err
    bench.finds(score=1)
    assert bench.deploy(2, "--json", "--report", "reports") == 0
    said = json.loads(bench.out)
    assert said == json.loads(Path("reports/deployment-it-2.json").read_text())
    assert said["stages"] == list(STAGES)


BARE = "import dspy\nPROGRAM = dspy.Predict('a -> b')\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["evaluate(program)", "PROGRAM", "THRESHOLDS", "def evaluate(program):"]),
        (BARE + "evaluate = 3", ["evaluate(program)", "THRESHOLDS"]),
        (BARE + "THRESHOLDS = {'a': 1}", ["evaluate(program)"]),
        ("def evaluate(program): ...\nBASELINE = {'a': 1}", ["program() or PROGRAM"]),
        ("import nowhere", ["ModuleNotFoundError", "evals.py"]),
        ("import sys; sys.exit(0)", ["SystemExit"]),
        ("def (", ["SyntaxError"]),
        (BARE + "def evaluate(program): ...\nTHRESHOLDS = {'a': 'b'}", ["minimum"]),
    ],
)
def test_an_evaluation_file_that_lacks_something_is_told_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: list[str]
) -> None:
    """Everything that is missing, and how a whole file looks."""
    path = tmp_path / "evals.py"
    path.write_text(text)
    assert main(["deploy", "it", "--candidate", "1", "--eval", str(path)]) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said


def test_the_example_in_the_error_is_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read without complaint, beside a module as it supposes."""
    from dspy_prod.cli.eval_file import EXAMPLE, read

    (tmp_path / "myapp.py").write_text(
        "import dspy\nTriage = lambda: dspy.Predict('a -> b')\ndevset = []\nmetric = max\n"
    )
    (tmp_path / "evals.py").write_text(EXAMPLE)
    monkeypatch.setattr(dspy, "configure", lambda **_: None)
    found = read(tmp_path / "evals.py")
    assert dict(found.thresholds) == {"accuracy": 0.85}
    assert found.baseline == "triage@production"
