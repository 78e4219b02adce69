"""The notebooks run from top to bottom and show what they are to show; cells may be run again, and may await."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
nbformat = pytest.importorskip("nbformat")

from tests.notebooks.running import NOTEBOOKS, execute, faults, load, pictures, shown  # noqa: E402

MOST_BYTES = 1_500_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_can_be_read(path: Path) -> None:
    """Each notebook comes with the outputs of a run from top to bottom: pictures, and nothing that is noise."""
    notebook = load(path)
    assert faults(notebook) == []
    assert pictures(notebook) >= 2
    numbers = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))
    assert path.stat().st_size < MOST_BYTES
    first = notebook.cells[0]
    assert (first.cell_type, first.source.startswith("# ")) == ("markdown", True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path: Path) -> None:
    """In its short form, on the local model where that is installed and else on a simulated provider."""
    notebook = execute(load(path), timeout=300, DSPY_PROD_NOTEBOOK_SHORT="1")
    assert faults(notebook) == []
    assert pictures(notebook) >= 2


AGAIN = """
lm = dspy_prod.LM(
    "openai/m", api_base=provider.url, api_key="x", store=STORE, budget=dspy_prod.Budget(usd=USD, per="day"),
    prices={"openai/m": dspy_prod.Price(input=1, output=1)}, max_tokens=10,
)
dspy.configure(lm=lm, adapter=dspy.JSONAdapter())
program = dspy.Predict("question -> answer")
print(program(question="q USD").answer, lm.costs().budget_usd)
"""
IMPORTS = """
import asyncio, json, warnings
import dspy, dspy_prod
from dspy_prod.testing import Provider
warnings.simplefilter("ignore")
provider = Provider(answer='{"answer": "yes"}')
provider.start()
"""
LOOP = """
found = await asyncio.gather(*(lm.acall(f"question {number}") for number in range(3)))
print(json.dumps(found))
parts = [part async for part in dspy.streamify(program)(question="q")]
print(parts[-1].answer)
print(dspy.streamify(program, async_streaming=False)(question="q") is not None)
"""


@pytest.mark.long
@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_a_cell_with_another_budget_and_one_that_awaits(tmp_path: Path, store: str) -> None:
    """A budget that is built again with another amount holds; `await` and `streamify` work in the kernel's loop."""
    url = "memory://again" if store == "memory" else f"sqlite:///{tmp_path}/again.db"

    def built(usd: str) -> str:
        return AGAIN.replace("STORE", repr(url)).replace("USD", usd)

    cells = [IMPORTS, built("1"), built("0.25"), built("3"), LOOP, "lm.health()", "print(lm.health())"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    seen: dict[int, dict[str, str]] = {}
    for number, kind, text in shown(execute(notebook, timeout=120)):
        cell = seen.setdefault(number, {})
        assert kind == "stdout" or kind not in cell, "a table is one output, and not several of its parts"
        cell[kind] = cell.get(kind, "") + text
    assert [seen[number]["stdout"].split() for number in (1, 2, 3)] == [["yes", "1.0"], ["yes", "0.25"], ["yes", "3.0"]]
    first, *others = seen[4]["stdout"].splitlines()
    assert json.loads(first) == [['{"answer": "yes"}']] * 3
    assert others == ["yes", "True"]
    assert set(seen[5]) == {"text/html", "text/plain"}
    assert "<table" in seen[5]["text/html"]
    assert seen[5]["text/plain"].splitlines()[0] == "Health: healthy"
    assert set(seen[6]) == {"stdout"}


FORECAST = """
metric = lambda example, prediction, trace=None: float(prediction.answer == "yes")
examples = [dspy.Example(question=f"q {number}", answer="yes").with_inputs("question") for number in range(12)]
optimizer = dspy_prod.BudgetedOptimizer(
    dspy.LabeledFewShot(k=2), metric=metric, budget_usd=1.0, store=STORE, name="shown",
)
optimizer.forecast(program, trainset=examples)
"""


@pytest.mark.long
def test_a_forecast_shows_how_far_it_is_and_leaves_its_table(tmp_path: Path) -> None:
    """In place, and without a bar that needs an extension: nothing of it is left afterwards."""
    url = repr(f"sqlite:///{tmp_path}/forecast.db")
    cells = [IMPORTS, AGAIN.replace("STORE", url).replace("USD", "1"), FORECAST.replace("STORE", url)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    run = execute(notebook, timeout=120)
    assert faults(run) == []
    outputs = [(kind, text) for number, kind, text in shown(run) if number == 2]
    assert [text for kind, text in outputs if kind == "text/html" and "<progress" in text] == []
    assert ("text/html", "") in outputs  # where it was
    assert sum("<table" in text for kind, text in outputs if kind == "text/html") == 1
