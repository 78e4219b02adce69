"""What a rehearsal would have cost."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from dspy.lm15 import Usage

from dspy_prod.optimize.pilot import Measured
from dspy_prod.pricing.rates import Rates


@dataclass
class Bill:
    """What a rehearsal would have cost.

    Attributes:
        usd: dollars by model. guessed: the part of them that proposers and judges cost; own, own_calls: the rest.
        given: what a call of the given program cost.
        alone, together: seconds of calls in the thread that made the bill, `main`, and in others.
    """

    usd: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    guessed: float = 0.0
    own: float = 0.0
    own_calls: int = 0
    given: float = 0.0
    calls: int = 0
    cached: int = 0
    tokens: float = 0.0
    alone: float = 0.0
    together: float = 0.0
    unpriced: set[str] = field(default_factory=set)
    main: int = field(default_factory=threading.get_ident)

    def charge(
        self, model: str, measured: Measured, rates: Rates | None, chars: int, texts: Sequence[str], own: bool
    ) -> None:
        """Count an answer that would have come from upstream.

        Args:
            model: of the LM. measured: how its texts become tokens and seconds. rates: its prices; None: unknown.
            chars: of the prompt. texts: of the answer. own: a predictor of the program asked.
        """
        for text in texts:
            inputs, outputs = round(measured.tokens(chars)), max(1, round(measured.tokens(len(text), out=True)))
            self.calls += 1
            self.tokens += inputs + outputs
            seconds = measured.seconds / measured.records if measured.records else 1.0
            if threading.get_ident() == self.main:
                self.alone += seconds
            else:
                self.together += seconds
            nano = None if rates is None else rates.cost(Usage(input_tokens=inputs, output_tokens=outputs))
            if nano is None:
                self.unpriced.add(model)
                continue
            self.usd[model] += nano / 1e9
            if own:
                self.own += nano / 1e9
                self.own_calls += 1
            else:
                self.guessed += nano / 1e9
