"""The admission core: whether a call may go, for its limits and its money together. Pure: no lock, clock or I/O.

What a rate limit or an account allows, who waits in which order and what a settlement changes belong here, and hold
for every store. Only stores import it.
"""
