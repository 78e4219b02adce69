"""State that outlives a call: limits, budgets, holds, the ledger and kept answers, in memory or in a SQLite file.

`base.py` is the protocol and the vocabulary; `admission` decides, in one pure core for every store; `lane.py` and
`sqlite` say who may use it when, and write down what it did. A new kind of store implements `base.Store`, passes
`tests/stores/test_contract.py` and is opened in `opening.py`. Imported from above, by `policies` and higher.
"""
