"""What durable stores have in common: one thread that decides, writes in groups and only then tells.

What is written to, and what is read from there, is a `Tables` of theirs (`tables.py`).
"""
