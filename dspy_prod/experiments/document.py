"""A `Scorecard` as a page of its own: no script, nothing to load, every text escaped."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Final

from dspy_prod.experiments import pages
from dspy_prod.experiments.charts import forest, sequence
from dspy_prod.experiments.wording import Wording, progress, way
from dspy_prod.views.cells import LONGEST_PARAGRAPH, cut, told

if TYPE_CHECKING:
    from dspy_prod.experiments.decisions import MetricEvidence
    from dspy_prod.experiments.facts import Facts
    from dspy_prod.views import Table

_STYLE: Final = """
:root{color-scheme:light dark;--ink:#1d2733;--faint:#5d6b7a;--line:#d9dfe5;--page:#f5f7f9;--sheet:#fff;
--good:#177245;--bad:#b8322a;--warn:#94660b;--plain:#2b5d8a}
@media (prefers-color-scheme:dark){:root{--ink:#e4e9ee;--faint:#9aa8b5;--line:#38434e;--page:#14191e;--sheet:#1d242b;
--good:#5cc08f;--bad:#f0857c;--warn:#dcae55;--plain:#86b7e0}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.45 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:66rem;margin:0 auto;padding:1rem}
h1,h2,h3{line-height:1.2;overflow-wrap:anywhere}h1{font-size:1.5rem;margin:.25rem 0}
h2{font-size:1.15rem;margin:1.75rem 0 .5rem}h3{font-size:1rem;margin:0}
p{margin:.35rem 0;overflow-wrap:anywhere}.note{color:var(--faint);font-size:.85rem}.range{white-space:nowrap}
.sheet{background:var(--sheet);border:1px solid var(--line);border-radius:.6rem;padding:.9rem 1rem;min-width:0}
.verdict{border-left:.4rem solid var(--plain)}.verdict.good{border-left-color:var(--good)}
.verdict.bad{border-left-color:var(--bad)}.verdict.warn{border-left-color:var(--warn)}
.verdict>strong{font-size:1.15rem}.beware{color:var(--warn)}
.facts{display:flex;flex-wrap:wrap;gap:.4rem 1.75rem;margin:.75rem 0 0}.facts div{min-width:0}
.facts dt{color:var(--faint);font-size:.8rem}.facts dd{margin:0;font-variant-numeric:tabular-nums;font-weight:600;
overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:.75rem}
.head{display:flex;justify-content:space-between;align-items:baseline;gap:.75rem}
.chip{font-size:.8rem;font-weight:600;white-space:nowrap}
.chip.better,.chip.no_worse,strong.good{color:var(--good)}.chip.worse,strong.bad{color:var(--bad)}.chip.void,strong.warn{color:var(--warn)}
.chip.unclear{color:var(--faint)}
.claim{display:grid;grid-template-columns:5rem 1fr auto;gap:.6rem;align-items:center;font-size:.85rem;margin-top:.3rem}
.claim span:last-child{font-variant-numeric:tabular-nums}
.way{height:.45rem;border-radius:.25rem;background:var(--line);overflow:hidden}
.way i{display:block;height:100%;background:var(--plain)}
.way.proven i{background:var(--good)}.way.proven.worse i{background:var(--bad)}
svg{display:block;width:100%;max-width:30rem;height:auto;margin-top:.6rem;font-size:12px}
svg text{fill:var(--ink)}svg text.faint{fill:var(--faint);font-size:11px}svg text.name{font-weight:600}
svg .better,svg .no_worse{--own:var(--good)}svg .worse{--own:var(--bad)}svg .void{--own:var(--warn)}
svg .unclear{--own:var(--plain)}svg text.better,svg text.no_worse,svg text.worse{fill:var(--own)}
svg circle{fill:var(--own)}svg .bar{stroke:var(--own);stroke-width:2;fill:none}
svg .band{fill:var(--own);opacity:.18}svg .mean{fill:none;stroke:var(--own);stroke-width:1.8}
svg .zero{stroke:var(--faint);stroke-width:1}svg .margin{stroke:var(--warn);stroke-width:1.5;stroke-dasharray:4 3}
.scroll{overflow-x:auto;margin-top:1rem}.scroll table{min-width:min(100%,24rem)}
@media print{:root{--page:#fff;--sheet:#fff}main{padding:0;max-width:none}.sheet{break-inside:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def document(card: Facts) -> str:
    """The whole page."""
    title = _said(f"Experiment {card.name}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main><h1>{title}</h1>"
        f"{''.join(_sections(card))}</main></body></html>\n"
    )


def _sections(card: Facts) -> Iterator[str]:
    yield _verdict(card)
    if card.url is not None:
        yield f'<p class="note"><a href="{escape(card.url)}">The variants side by side in MLflow</a></p>'
    yield "<h2>Differences</h2>"
    yield _note(
        "Dot: the difference so far. Line: 95 % interval at all looks together, shown from 100 users a variant on. "
        "Dashed: the margin, up to which worse is acceptable. Each metric has its own scale; right is better."
    )
    sheets = [
        f'<div class="sheet"><h3>{_said(name)} against {_said(card.control)}</h3>{forest(card, name)}</div>'
        for name in card.candidates
    ]
    yield f'<div class="grid">{"".join(sheets)}</div>'
    for name, candidate in card.candidates.items():
        many = f", {_said(name)}" if len(card.candidates) > 1 else ""
        yield f"<h2>Evidence{many}</h2>"
        yield _note(
            "A bar is how far the e-value of a claim is on its way to what proves it, on a logarithmic scale. "
            "Below: the difference, with its interval, against users in the order of exposure."
        )
        metrics = "".join(_metric(card, name, each) for each in candidate.metrics)
        yield f'<div class="grid">{metrics}</div>'
    if card.calls:
        yield _table(pages.calls(card))
    if card.stages:
        yield _table(pages.users(card))
    if card.unseen is not None:
        yield _table(pages.unseen(card.unseen))
    if card.audit:
        yield _table(pages.audit(card))


def _verdict(card: Facts) -> str:
    said, tone = pages.verdict(card)
    facts = [
        ("state", pages.state(card)), ("since", pages.moment(card.since)),
        *((f"users of {name}", f"{count:,}") for name, count in card.users.items()),
        *((f"count so far in {names}", words) for names, words in pages.waits(card)),
        *([("horizon", card.horizon)] if card.horizon is not None else []),
        ("users hurt", f"{card.hurt:,}"),
    ]  # fmt: skip
    listed = "".join(f"<div><dt>{_said(name)}</dt><dd>{_said(value)}</dd></div>" for name, value in facts)
    beware = "".join(f'<p class="beware">⚠ {_said(each)}</p>' for each in card.warnings)
    reason = escape(cut(told(card.reason), LONGEST_PARAGRAPH))
    return (
        f'<section class="sheet verdict {tone}"><strong class="{tone}">{_said(said)}</strong><p>{reason}</p>'
        f'{beware}<dl class="facts">{listed}</dl></section>'
    )


def _metric(card: Facts, candidate: str, found: MetricEvidence) -> str:
    amounts, shown = Wording(card.metric(found.metric)), found.interval
    looks = [each for each in card.history if (each.candidate, each.metric) == (candidate, found.metric)]
    margin = amounts.accepted()
    nothing = "all 0 so far" if found.nothing else ""
    told_more = " · ".join(filter(None, (found.role, amounts.unit, f"margin {margin}" if margin else "", nothing)))
    means = ""
    if shown is not None:
        between = amounts.range(shown.low, shown.high)
        bounds = f' <span class="note range">({_said(between)})</span>' if between else ""
        means = (
            f"<p>{_said(amounts.value(shown.control))} → {_said(amounts.value(shown.candidate))}: "
            f"<strong>{_said(amounts.difference(shown.difference))}</strong>"
            f"{bounds}</p>"
        )
    claims = "".join(_claim(*each) for each in pages.claims(found))
    return (
        f'<div class="sheet"><div class="head"><h3>{_said(found.metric)}</h3>'
        f'<span class="chip {found.status}">{_said(pages.STATUSES[found.status][0])}</span></div>'
        f'<p class="note">{_said(told_more)}</p>{means}'
        f'<p class="note">{found.control_units:,} and {found.candidate_units:,} users</p>'
        f"{claims}{sequence(card, found, looks)}</div>"
    )


def _claim(name: str, e_value: float, needed: float) -> str:
    proven = f" proven {name.replace(' ', '_')}" if e_value >= needed else ""
    return (
        f'<div class="claim"><span>{name}</span><span class="way{proven}">'
        f'<i style="width:{100 * way(e_value, needed):.0f}%"></i></span><span>{progress(e_value, needed)}</span></div>'
    )


def _table(given: Table) -> str:
    return f'<div class="sheet scroll">{"".join(given.elements())}</div>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _said(text: str) -> str:
    return escape(cut(told(text)))
