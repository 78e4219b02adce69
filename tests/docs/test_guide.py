"""The guide does what it says: its code runs, its tables are the code's, its names and links exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dspy_prod
from dspy_prod.testing import Provider
from tests.docs.pages import GUIDE, PAGES, ROOT, blocks, running
from tests.docs.runner import run
from tests.extras import needed

ELSEWHERE = {
    "signals.md": "tests/metrics/test_dashboard.py",
    "service.md": "tests/asgi",
}
"""Pages whose code another test runs, with what it needs."""

DEFAULTS = {
    "breaker.md": dspy_prod.CircuitBreaker,
    "limiter.md": dspy_prod.RateLimit,
    "budget.md": dspy_prod.Budget,
    "cache.md": dspy_prod.Cache,
    "retry.md": dspy_prod.Retry,
}


@pytest.mark.long
def test_every_python_block_runs(tmp_path: Path) -> None:
    """The Python of each page, from top to bottom in a process of its own, runs against a provider."""
    pieces = [
        {"name": page.name, "blocks": [(block.line, block.code) for block in running(page)]}
        for page in PAGES
        if page.name not in ELSEWHERE and running(page)
    ]
    with Provider() as provider:
        ended = run(
            pieces, tmp_path, ROOT, OPENAI_API_BASE=provider.url, OPENAI_API_KEY="test", ANTHROPIC_API_KEY="test"
        )
        assert len(provider.calls) > 20
    failed = {name: end["said"][-3000:] for name, end in ended.items() if end["code"]}
    assert not failed, "\n\n".join(f"--- {name}\n{said}" for name, said in failed.items())
    assert "ok openai/gpt-4o-mini" in ended["production.md"]["said"]
    assert "is another model" in ended["embeddings.md"]["said"]
    assert "exported=1 waiting=0 sampled_out=0 lost=0 failing=None" in ended["tracking.md"]["said"]


def test_the_toml_block_configures_an_lm(tmp_path: Path) -> None:
    """The TOML of the page on configuration is accepted as it stands."""
    path = tmp_path / "prod.toml"
    path.write_text(next(each.code for each in blocks(GUIDE / "configuration.md") if each.language == "toml"), "utf-8")
    lm = dspy_prod.LM.from_config(path, store="memory://guide", api_key="test")
    assert lm.model == "openai/gpt-4o-mini"
    assert lm.settings.limit is not None
    assert lm.settings.limit.rpm == 500
    assert lm.settings.budgets[0].scope == "tenant"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_only_shown_says_why(page: Path) -> None:
    """A block that does not run gives a reason, and every Python block of the page is seen by the runner."""
    found = blocks(page)
    assert all(block.why_not is None or len(block.why_not) > 10 for block in found)
    python = [block for block in found if block.language == "python"]
    assert len(python) == len(re.findall(r"^ *```python", page.read_text("utf-8"), re.M))


@pytest.mark.parametrize("page", sorted(DEFAULTS))
def test_tables_of_defaults_are_the_code_s(page: str) -> None:
    """Each field of the options has its row, with the default that it has."""
    text = (GUIDE / page).read_text("utf-8")
    for name, field in DEFAULTS[page].model_fields.items():
        default = "required" if field.is_required() else f"`{field.default!r}`"
        assert f"| `{name}` | {default} |" in text, (name, default)


@pytest.mark.parametrize(
    "command", sorted({c for p in PAGES for c in re.findall(r"dspy-prod ([a-z]+)\b", p.read_text("utf-8"))})
)
def test_every_command_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each `dspy-prod` command of the guide is known to the parser."""
    from dspy_prod.cli import main

    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert command in capsys.readouterr().out


def test_every_make_target_exists() -> None:
    """Each `make` command of the guide is a target of the Makefile."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    named = {
        (page.name, target) for page in PAGES for target in re.findall(r"`make ([a-z-]+)", page.read_text("utf-8"))
    }
    assert [each for each in named if not re.search(rf"^{each[1]}:", makefile, re.M)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_within_the_repository_resolves(page: Path) -> None:
    """Pages and pictures that a page links to exist, as the repository shows it and without building the site."""
    targets = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text("utf-8"))
    missing = [each for each in targets if not each.startswith("reference/") and not (GUIDE / each).exists()]
    assert missing == []


@pytest.mark.slow
def test_the_site_builds_and_asks_no_other_host(tmp_path: Path) -> None:
    """The site is built in strict mode; no page of it loads anything from elsewhere."""
    needed("mkdocs")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "-f",
            str(ROOT / "docs" / "mkdocs.yml"),
            "-d",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    loaded = r"<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=\"((?:https?:)?//[^\"]+)"
    foreign = {url for page in tmp_path.rglob("*.html") for url in re.findall(loaded, page.read_text("utf-8"))}
    assert foreign == set()
    assert not [
        sheet for sheet in tmp_path.rglob("*.css") if re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text("utf-8"))
    ]
