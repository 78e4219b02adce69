"""A page as an HTML file of its own: for a browser, a phone, a printer. It loads nothing and runs nothing."""

from __future__ import annotations

from html import escape
from typing import Final

from dspy_prod.views.cells import cut, told
from dspy_prod.views.parts import Page, Part

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE: Final = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem; line-height: 1.2; overflow-wrap: anywhere }
section { overflow-x: auto; margin: 0 0 1.5rem }
table { font-size: .9em }
td:first-child { overflow-wrap: anywhere; min-width: 8rem }
@media print {
  :root { color-scheme: light }
  body { font-size: 11px; max-width: none; padding: 0 }
  section { overflow: visible }
  tr { break-inside: avoid }
  svg rect { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""


def document(title: str, page: Part) -> str:
    """The page as a whole HTML document.

    Args:
        title: of the document, and its heading.
        page: what it shows; the parts of a `Page` stand below each other, each as wide as it has to be.
    """
    parts = page.parts if isinstance(page, Page) else (page,)
    said = escape(cut(told(title)))
    sections = "".join(
        f"<section>{''.join((Page(part) if isinstance(part, str) else part).elements())}</section>" for part in parts
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{said}</title><style>{_STYLE}</style></head>\n<body><h1>{said}</h1>\n{sections}\n</body></html>\n"
    )
