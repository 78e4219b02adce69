"""What the library shows to people: tables, pages of them, and pictures, as text and as HTML for notebooks.

Whoever has something to show says what, as a `Table` or a `Page`, and is a `Shown`; how it looks stands here, once,
for `print`, for a notebook and for the commands. Every text passes `privacy.outward` here and is bounded in length.
"""

from __future__ import annotations

from dspy_prod.views.cells import Cell, share, usd
from dspy_prod.views.frames import frame
from dspy_prod.views.parts import Code, Page, Picture, Table
from dspy_prod.views.shown import Shown, ShownList

__all__ = ["Cell", "Code", "Page", "Picture", "Shown", "ShownList", "Table", "frame", "share", "usd"]
