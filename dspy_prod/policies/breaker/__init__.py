"""The circuit breaker of one route: one class per state, the move between them, and the window they look at.

A change of when a circuit opens or closes belongs in `states`, of what counts as recent in `window`. What counts as a
failure is not decided here but in the pipeline's table of outcomes.
"""
