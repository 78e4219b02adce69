"""What can be heard and seen of a call: events for listeners, log lines, and the tap of whoever traces.

A new event, or a new way to listen, belongs here; where it is emitted, in the room in which it happens. Nothing here
may fail, delay or import anything heavy on behalf of a call.
"""
