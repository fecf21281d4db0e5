"""Merging over time: experts that come one after another, and checkpoints along one training run.

    from cfmerge import temporal
    time = temporal.Time("store", base="base", protocol="best-in-time", weight=0.5)
    start = time.init()                                                from which the next task starts
    time.store(expert, "task"), time.deploy("served"), time.evaluate({"task": 0.9})

    temporal.combined("ema(weight=0.5)", base_tree, expert_trees)      a rule, on trees in memory

See docs/temporal.md.
"""

from cfmerge.temporal.combining import combined as combined
from cfmerge.temporal.protocol import Time as Time
from cfmerge.temporal.rules import Rule as Rule
from cfmerge.temporal.rules import protocol as protocol
from cfmerge.temporal.rules import rule as rule
