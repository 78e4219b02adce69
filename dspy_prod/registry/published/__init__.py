"""Versions: a program becomes one, is loaded from one, compared with another, and followed.

What a version contains and what makes two of them different belongs here. It knows nothing of promotion; `follow.py`
only reads where an alias points.
"""
