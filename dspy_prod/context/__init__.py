"""Under which conditions a call is made: user, tenant, deadline, priority, program version, and whether it is scored.

Context variables and what may be read from them. What a condition does belongs in the room that obeys it.
"""
