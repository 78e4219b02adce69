"""What a library in other people's processes has to mind: clocks, forks, the end, work for no finaliser.

Nothing here knows what a call is. What must survive a fork is registered in `forking.py`, with its place in the order.
"""
