"""Looking without touching: health, costs, previews, and the ledger for people.

Answers are frozen models (`models.py`), made from what stores, pipelines and tracking know. A new figure belongs here;
what it is counted from, in the room that counts. Nothing here sends, reserves or settles a call.
"""
