"""`deploy`: a candidate through its gate and from alias to alias, continued wherever it was broken off.

Steps and their order belong here; one move of an alias belongs in `aliases`, making a version in `published`.
"""
