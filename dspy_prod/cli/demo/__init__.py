"""`dspy-prod demo`: a support-triage program meets load, an outage and an empty purse, on a real small model.

Everything of the demo is here, and nothing else needs it. What it shows off belongs in the library.
"""
