"""The rules of each policy by itself: retry, budget, cache, single-flight, breaker.

A policy takes its options and a clock, keeps no state that others must share (that is in `stores`), and knows no other
policy: `pipeline` puts them together. A new policy, or a change of what one decides, belongs here; its options in
`options/`. Rate limits are decided in `stores/admission`, where processes share them.
"""
