"""What a call costs, and at most: prices of models, and bounds on tokens before they are known.

Integers of nano-USD throughout. Where money is held and charged is `stores`, what may be spent `policies/budget.py`.
"""
