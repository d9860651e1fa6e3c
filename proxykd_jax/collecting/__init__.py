"""Asks a teacher behind an API, and keeps its answers as a corpus.

``requests``: prompts become requests, each with a key. ``exchange``: one HTTP exchange with a
deadline. ``askers``: threads that talk to the server. ``replies``: what a reply means. ``rows``:
lines of the files. ``limits``: rates and the budget. ``ledger``: what was sent, paid and answered,
on disk. ``collector``: the loop over all of them. ``batch``: batch files. ``estimate``: what a
collection would cost.
"""
