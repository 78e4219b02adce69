"""`Production`: a whole program that keeps answering, above the LMs it calls.

Conditions for all calls of a run, the last fallback when no model answers, and the report of what each call did. What
concerns one LM call belongs in `lm` or beneath it; these two rooms do not know each other.
"""
