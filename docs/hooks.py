"""What MkDocs finds besides the pages in `guide/`: the order of the pages, the API reference, and the pictures.

Pages link to pictures and files of the repository as they stand there, so that both the repository's own view of a page
and the built site show them.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

NAV: Final[dict[str, tuple[str, ...]]] = {
    "Begin": ("index", "context", "production", "costs", "notebooks"),
    "Policies": ("breaker", "limiter", "budget", "runs", "cache", "retry", "fallbacks", "store", "flow"),
    "Operate": ("configuration", "service", "signals", "fleet", "tracking", "registry", "privacy", "troubleshooting"),
    "Improve": ("optimization", "scale", "experiments", "embeddings", "testing"),
    "Come from elsewhere": ("from-dspy-lm", "from-litellm-router", "from-tenacity"),
    "Measured": ("benchmarks",),
}
"""Section → pages. One that does not exist is left out; one that nobody named here stands at the end."""

FILES: Final = {
    "SECURITY.md": "security-policy.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages of the repository that are pages of the site too."""

REFERENCE: Final[dict[str, str]] = {
    "LM and its policies": "LM wrap from_config Configured Budget Cache CircuitBreaker Price RateLimit Retry",
    "Calls": "call_context Run Production CallReport call_report",
    "Costs and health": "CallRecord ProgramCall CostSummary Preview Health health",
    "Errors": "ConfigError RejectedError CircuitOpenError RateLimitedError BudgetExceededError RunStoppedError "
    "OutageError DeadlineExceededError UnpricedModelError StoreUnavailableError UnusableAnswerError",
    "Events, logs, privacy": "Event add_listener enable_logging Redactor",
    "Optimization": "BudgetedOptimizer OptimizationReport",
    "Experiments": "Experiment Metric Rollout Judge Scorecard",
}
"""Title of a page → names of `dspy_prod`. A name that stands nowhere here is on the page `others`."""

MODULES: Final = ("testing", "privacy", "asgi", "guardrails")
"""Public modules besides those that `dspy_prod.__all__` names."""

OPTIONS: Final = {"LM": {"inherited_members": ["breaker", "resume", "costs_report"]}}


class Examples(griffe.Extension):
    """Docstrings here say `Example:` where this style expects `Examples:`; else `>>>` would become a quotation."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Order the pages that exist."""
    there = {path.stem for path in Path(config.docs_dir).glob("*.md")}
    nav: list[Any] = []
    for section, pages in NAV.items():
        found = [{"Overview": "index.md"} if page == "index" else f"{page}.md" for page in pages if page in there]
        nav += [{section: found}] if found else []
    rest = sorted(there - {page for pages in NAV.values() for page in pages})
    nav += [{"More": [f"{page}.md" for page in rest]}] if rest else []
    nav.append({"Reference": [f"reference/{name}.md" for name, _, _ in reference()]})
    nav.append({"Project": [page for file, page in FILES.items() if (ROOT / file).exists()]})
    config.nav = nav
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the reference, the pictures, and the repository's own pages."""
    for name, title, text in reference():
        files.append(File.generated(config, f"reference/{name}.md", content=f"# {title}\n\n{text}"))
    for file, page in FILES.items():
        if (ROOT / file).exists():
            text = re.sub(r"\]\((?:\./)?([A-Z]+\.md)\)", _own, (ROOT / file).read_text("utf-8"))
            files.append(File.generated(config, page, content=text))
    for picture in sorted((ROOT / "notebooks" / "images").glob("*.png")):
        files.append(File.generated(config, f"images/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Links into the repository become links within the site; what stands side by side gets the whole width."""
    if '<div class="grid"' in markdown:
        page.meta["hide"] = ["toc"]
    markdown = markdown.replace("](../../notebooks/images/", "](images/")
    return re.sub(r"\]\(\.\./\.\./([A-Z]+\.md)\)", _own, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Long names in tables are broken after dots and underscores, and nowhere else."""
    cells = re.compile(r"<td\b[^>]*>.*?</td>", re.S)
    return cells.sub(lambda cell: re.sub(r"<code>[^<]*</code>", _breakable, cell[0]), html)


def _breakable(code: re.Match[str]) -> str:
    return re.sub(r"(?<=\w)([._/=])(?=\w)", r"\1<wbr>", code[0].removesuffix("</code>")) + "</code>"


def _own(match: re.Match[str]) -> str:
    return f"]({FILES.get(match[1], 'index.md')})"


def reference() -> Iterable[tuple[str, str, str]]:
    """The reference's pages: file name, title, text."""
    package = importlib.import_module("dspy_prod")
    public = {name: getattr(package, name) for name in package.__all__}
    names = [name for name, value in public.items() if not isinstance(value, ModuleType)]
    named = {name for each in REFERENCE.values() for name in each.split()}
    pages = {title: [name for name in each.split() if name in names] for title, each in REFERENCE.items()}
    pages["Others"] = [name for name in names if name not in named]
    for title, members in pages.items():
        if members:
            yield _file(title), title, "\n".join(_entry("dspy_prod", name) for name in members)
    for name in sorted({*MODULES, *(name for name in public if name not in names)}):
        module = importlib.import_module(f"dspy_prod.{name}")
        intro = f"```python\nfrom dspy_prod import {name}\n```\n\n{(module.__doc__ or '').splitlines()[0]}\n\n"
        yield name, f"dspy_prod.{name}", intro + "\n".join(_entry(module.__name__, each) for each in module.__all__)


def _file(title: str) -> str:
    return re.sub(r"[^a-z]+", "-", title.lower()).strip("-")


def _entry(package: str, name: str) -> str:
    options = OPTIONS.get(name, {})
    lines = [f"        {key}: {value}" for key, value in options.items()]
    return "\n".join([f"::: {package}.{name}", *(["    options:", *lines] if lines else []), ""])
