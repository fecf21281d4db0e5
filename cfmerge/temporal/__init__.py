"""Merging over time: experts that come one after another, and checkpoints along one training run.

    from cfmerge import temporal
    temporal.combined("ema(weight=0.5)", base_tree, expert_trees)      a rule, on trees in memory

See docs/temporal.md.
"""

from cfmerge.temporal.combining import combined as combined
from cfmerge.temporal.rules import Rule as Rule
from cfmerge.temporal.rules import protocol as protocol
from cfmerge.temporal.rules import rule as rule
