"""The door through which texts leave the process: log lines, events, errors, health, reports, MLflow.

Known secrets go first, in every form in which somebody may have repeated them, and passwords of URLs; then what an
installed redactor finds. Whoever cuts a text cuts it afterwards: half a secret is known to nobody.
"""

from __future__ import annotations

import logging
from typing import Final

from dspy_prod import privacy
from dspy_prod.privacy.known import known
from dspy_prod.privacy.names import said_of


def outward(text: str) -> str:
    """The text as it may leave the process. Whole, and line by line as it was."""
    text = said_of("", text, known())
    redactor = privacy.active()
    return text if redactor is None else redactor.text(text)


LET_OUT: Final = {"let_out": True}
"""`extra` of a record whose text has passed already."""


def passed(record: logging.LogRecord) -> bool:
    """True: every record of our logger passes, its text and its traceback as they may leave the process."""
    if hasattr(record, "let_out"):
        return True
    text = record.getMessage()
    clean = outward(text)
    if clean != text:
        record.msg, record.args = clean, None
    if record.exc_info and record.exc_info[1] is not None:
        told = logging.Formatter().formatException(record.exc_info)
        clean = outward(told)
        if clean != told:
            record.exc_info, record.exc_text = None, clean
    return True
