"""What every test shares: no network, none of the developer's own credentials or endpoints, and nothing left behind."""

from __future__ import annotations

import ast
import functools
import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from tests.examples import by_default

# At import, before any test module imports dspy or litellm: both read these variables once.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
for _name in [name for name in os.environ if name.upper().endswith(("_API_KEY", "_API_BASE", "_BASE_URL"))]:
    del os.environ[_name]
by_default()


def _parse_one_at_a_time() -> None:
    """Until 3.11.8 and 3.12.2 Python's parser fails now and then in two threads at once (python/cpython#106905): DSPy
    parses signatures in threads, and pytest the source of a test that failed, whose whole run then ended."""
    if sys.version_info < (3, 11) or (3, 11, 8) <= sys.version_info < (3, 12) or sys.version_info >= (3, 12, 2):
        return
    inherited, one = ast.parse, threading.RLock()

    @functools.wraps(inherited)
    def parse(*args: Any, **kwargs: Any) -> Any:
        with one:
            return inherited(*args, **kwargs)

    ast.parse = parse


_parse_one_at_a_time()

SHARING = ("registry", "tracking", "cli", "ui")
"""Rooms whose tests share what is dear to make: a server, a run of the demo, MLflow itself. One worker takes a file of
them; of the registry, whose stores are made once, a folder."""
SHARING_FILES = ("test_in_mlflow.py", "test_runs_in_mlflow.py")
"""Files of other rooms that do."""
WITH_PROCESSES = (
    "test_conflicts.py", "test_deployment.py", "test_follow.py", "test_promotion.py", "test_server_down.py",
)  # fmt: skip
"""Files of the registry that share a server, two processes to race with and one that has children: one worker's."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What one worker of pytest-xdist takes at a time: tests that share, or a single one."""
    from xdist.scheduler import LoadScopeScheduling

    class Sharing(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = PurePosixPath(nodeid.split("::")[0])
            room = path.parts[1]
            if room not in SHARING and path.name not in SHARING_FILES:
                return nodeid
            if room == "registry":
                return "registry, with processes" if path.name in WITH_PROCESSES else str(path.parent)
            return str(path)

        def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
            """What is done is not gone through again at the end of each later test."""
            super().mark_test_complete(node, item_index, duration)
            units = self.assigned_work[node]
            unit = self._split_scope(self.registered_collections[node][item_index])
            if all(units[unit].values()):
                del units[unit]

        def _reschedule(self, node: Any) -> None:
            """A worker begins a test when it knows the next one. One that takes the place of one that crashed is given
            a single unit, and would wait for more until the end of time."""
            super()._reschedule(node)
            if self._pending_of(self.assigned_work[node]) < 2:
                super()._reschedule(node)

    return Sharing(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a worker: what takes long begins first, so that nobody is left with it at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """Thousands of tests are no garbage: no collection, of which the tests ask many, need look at them."""
    _keep()


LARGE = {"litellm", "mlflow"}
"""Packages of very many objects, which some test is the first to import."""


def pytest_runtest_logfinish() -> None:
    """Nor are large packages."""
    new = LARGE & sys.modules.keys()
    if new:
        LARGE.difference_update(new)
        _keep()


def _keep() -> None:
    """What is alive now stays out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with tables and nothing else: making them takes seconds, on a busy machine very many."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    client = MlflowClient(tracking_uri=f"sqlite:///{path}", registry_uri=f"sqlite:///{path}")
    client.search_experiments()
    client.search_prompts()
    return path


@pytest.fixture(scope="session")
def _exporters() -> Iterator[Any]:
    from tests.exporters import Exporters

    all_of_them = Exporters()
    yield all_of_them
    all_of_them.close()


@pytest.fixture
def quick_exporters(_exporters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that write to MLflow have imported it when they begin, which else takes each of them seconds."""
    _exporters.wait()
    monkeypatch.setattr("dspy_prod.tracking.process.subprocess", _exporters)


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    """The next test finds the whole process's settings as this one did: tests run in any order."""
    environment, dspy, mlflow = _environment(), _dspy(), _mlflow()
    yield
    if _mlflow() != mlflow:
        _restore_mlflow(*mlflow)
    for name in _environment().keys() | environment.keys():
        if name in environment:
            os.environ[name] = environment[name]
        else:
            os.environ.pop(name)
    if _dspy() != dspy:
        from dspy.dsp.utils.settings import main_thread_config

        main_thread_config.update(dspy)


def _environment() -> dict[str, str]:
    """The variables that MLflow sets by itself, and ours."""
    return {name: os.environ[name] for name in os.environ if name.startswith(("MLFLOW_", "DSPY_PROD"))}


def _dspy() -> dict[str, Any]:
    """What `dspy.configure` and MLflow's autologging set."""
    from dspy.dsp.utils.settings import main_thread_config

    return {**main_thread_config, "trace": list(main_thread_config["trace"])}


def _mlflow() -> tuple[str | None, str | None, str | None]:
    """MLflow's current experiment, store and registry; they have no public name that does not also make them."""
    if "mlflow" not in sys.modules:
        return None, None, None
    from mlflow.tracking import _model_registry, _tracking_service, fluent

    return fluent._active_experiment_id, _tracking_service.utils._tracking_uri, _model_registry.utils._registry_uri


def _restore_mlflow(experiment: str | None, store: str | None, registry: str | None) -> None:
    import mlflow
    from mlflow.tracking import _model_registry, fluent

    fluent._active_experiment_id = experiment
    mlflow.set_tracking_uri(store)
    _model_registry.utils._registry_uri = registry
