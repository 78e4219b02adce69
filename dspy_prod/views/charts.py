"""Bars that are stacked: sums over time, each bar made of what it came from. SVG without a script, and without text in
it, so that letters keep their size on a phone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from math import floor, fsum, log10
from typing import TYPE_CHECKING, Final

from dspy_prod.views.cells import cut, told
from dspy_prod.views.parts import Part, Table

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7a6ff0", "#a6761d")
"""Of layers, those that are told apart best first: also by the colour-blind, and on paper."""
REST: Final = ("#8c959f", "#c9ced4")
"""Of the layers that are no single value."""

_HIGH: Final = 100.0
_STEP, _GAP = 10.0, 1.5


@dataclass(frozen=True)
class Layer:
    """What one value adds to each bar.

    Attributes:
        name: of the value. values: one for each bar, none of them negative.
        rest: it stands for several values, or for none.
        note: what else is to be said of it.
    """

    name: str
    values: Sequence[float]
    rest: bool = False
    note: str = ""

    @property
    def total(self) -> float:
        """All of its values together."""
        return fsum(self.values)


@dataclass(frozen=True)
class Bars(Part):
    """A bar for each day or so, with a legend that says what each layer comes to.

    Args:
        title: what it shows. bars: what each bar is called, in order.
        layers: the lowest first, which is the first in the legend too.
        unit: before each figure.

    Example:
        ```python
        Bars("Cost per day by model", ("2026-11-28", "2026-11-29"), (Layer("openai/gpt-4o-mini", (0.2, 0.3)),)).html()
        ```
    """

    title: str
    bars: Sequence[str]
    layers: Sequence[Layer]
    unit: str = "$"

    @cached_property
    def colours(self) -> list[str]:
        """Of each layer."""
        plain, rest = iter(COLOURS * (len(self.layers) // len(COLOURS) + 1)), iter(REST * len(self.layers))
        return [next(rest) if layer.rest else next(plain) for layer in self.layers]

    @property
    def top(self) -> float:
        """The end of the axis: the highest bar, or a little more."""
        return _round_up(max((fsum(values) for values in zip(*self._values, strict=True)), default=0.0))

    @property
    def _values(self) -> list[Sequence[float]]:
        return [layer.values for layer in self.layers]

    def figure(self, value: float) -> str:
        """A value as it is written here."""
        return f"{self.unit}{value:,.4f}" if 0 < value < 1 else f"{self.unit}{value:,.2f}"

    def legend(self) -> Table:
        """The layers and what they come to."""
        whole = fsum(layer.total for layer in self.layers)
        rows = [
            (layer.name, self.figure(layer.total), f"{100 * layer.total / whole:.1f} %" if whole else "–")
            for layer in self.layers
        ]
        return Table(self.title, ("", "USD", "share"), rows, numbers=2)

    def drawn(self) -> Iterator[RenderableType]:
        yield from self.legend().drawn()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.legend().__rich_console__(console, options)

    def elements(self) -> Iterator[str]:
        ends = [_text(self.bars[0]), _text(self.bars[-1])] if self.bars else ["", ""]
        marks = "".join(f"<span>{escape(self._mark(share))}</span>" for share in (1.0, 0.5, 0.0))
        axis = "display:flex;flex-direction:column;justify-content:space-between;text-align:right;line-height:1"
        yield (
            f'<figure style="margin:1.5em 0;break-inside:avoid">'
            f'<figcaption style="font-weight:600;margin-bottom:.6em">{_text(self.title)}</figcaption>'
            f'<div style="display:flex;gap:.5em;height:12em;font-size:80%"><div style="{axis}">{marks}</div>'
            f'<div style="flex:1;border:solid #8c959f;border-width:0 0 1px 1px">{self._svg()}</div></div>'
            f'<div style="display:flex;justify-content:space-between;font-size:80%;margin:.2em 0 .6em 3.5em">'
            f"<span>{ends[0]}</span><span>{ends[1] if len(self.bars) > 1 else ''}</span></div>"
            f'<ul style="list-style:none;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:.2em 1.4em;font-size:90%">'
            f"{''.join(self._keys())}</ul></figure>"
        )

    def _mark(self, share: float) -> str:
        value = share * self.top
        return f"{self.unit}{value:,.4g}" if value else "0"

    def _svg(self) -> str:
        wide, top = max(1, len(self.bars)) * _STEP, self.top
        said = f"{self.title}: {', '.join(f'{one.name} {self.figure(one.total)}' for one in self.layers)}"
        return (
            f'<svg role="img" aria-label="{_text(said)}" viewBox="0 0 {wide:g} {_HIGH:g}" preserveAspectRatio="none" '
            f'style="display:block;width:100%;height:100%">'
            f"{''.join(self._bar(place, top) for place in range(len(self.bars))) if top else ''}</svg>"
        )

    def _bar(self, place: int, top: float) -> str:
        drawn, ground = [], _HIGH
        for layer, colour in zip(self.layers, self.colours, strict=True):
            value = layer.values[place]
            if value <= 0:
                continue
            high = _HIGH * value / top
            ground -= high
            title = f"{self.bars[place]}, {layer.name}: {self.figure(value)}"
            drawn.append(
                f'<rect x="{place * _STEP + _GAP / 2:g}" y="{ground:.3f}" width="{_STEP - _GAP:g}" height="{high:.3f}" '
                f'fill="{colour}"><title>{_text(title)}</title></rect>'
            )
        return "".join(drawn)

    def _keys(self) -> Iterator[str]:
        whole = fsum(layer.total for layer in self.layers)
        box = "display:inline-block;width:.8em;height:.8em;margin-right:.4em;print-color-adjust:exact"
        for layer, colour in zip(self.layers, self.colours, strict=True):
            share = f" ({100 * layer.total / whole:.0f} %)" if whole else ""
            note = f' <span style="opacity:.7">{_text(layer.note)}</span>' if layer.note else ""
            yield (
                f'<li style="overflow-wrap:anywhere"><span style="{box};background:{colour}"></span>'
                f"{_text(layer.name, 80)} <b>{escape(self.figure(layer.total))}</b>{share}{note}</li>"
            )


def _round_up(value: float) -> float:
    """The next number of one or two digits."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** floor(log10(value))
    return next(step * unit for step in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * unit >= value * (1 - 1e-9))


def _text(text: str, longest: int = 240) -> str:
    return escape(cut(told(text), longest))
