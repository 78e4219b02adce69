"""The SQLite store: one writer thread per store decides and commits in groups; readers never block it.

`store` is what callers see, `mailbox` how they reach the `writer`, `transactions` one batch, `tables` what is read and
written in it, `schema` the file itself. A decision belongs in `admission`; SQL belongs in no other room.
"""
