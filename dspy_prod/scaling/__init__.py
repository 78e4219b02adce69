"""Evaluating in many processes: `dspy_prod.evaluate(..., engine="ray")`.

The door is `evaluate`. What goes to another process is made in `parcel`, and what has to hold there in `carried`.
`worker` is what runs in such a process, `fleet` what gives out the examples and does those of a dead worker again, and
`on_ray` the `dspy.Evaluate` that puts them together. Ray itself is imported in `fleet` alone, when it is used.
"""

from __future__ import annotations
