"""Aliases: which version each points to, who moved it, and what a version has to show before.

The journal is the truth and moves by compare-and-set; MLflow's own aliases are drawn from it. Uses `published`.
"""
