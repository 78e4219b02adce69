"""Measurements of what dspy_prod costs, as ratios to bare DSPy within one interleaved run."""
