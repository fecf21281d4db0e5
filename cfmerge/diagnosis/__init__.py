"""Findings about experts: pure measurements of their deltas, and their words; no files, no options.

ranks.py    the rank of a delta, above the rounding of its dtype
choice.py   the rule of `method: auto`
"""
