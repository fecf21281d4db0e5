"""Merging over time: experts that come one after another, and checkpoints along one training run.

    from cfmerge import temporal
    time = temporal.Time("store", base="base", protocol="best-in-time", weight=0.5)
    start = time.init()                                                from which the next task starts
    time.store(expert, "task"), time.deploy("served"), time.evaluate({"task": 0.9})
    time.plan(), time.report().save("report"), time.forget("task")

    temporal.combined("ema(weight=0.5)", base_tree, expert_trees)      a rule, on trees in memory
    temporal.Reservoir, temporal.PerTask                               replay buffers
    temporal.run_setting("fomo-in-flux", ...)                          a published setting, on checkpoints

    temporal.along("run", last=5, decay="linear").recipe               the last checkpoints of one training run

See docs/temporal.md, docs/trajectory.md.
"""

from cfmerge.temporal.combining import combined as combined
from cfmerge.temporal.decays import coefficients as coefficients
from cfmerge.temporal.decays import decay_weights as decay_weights
from cfmerge.temporal.metrics import Metrics as Metrics
from cfmerge.temporal.metrics import backward_transfer as backward_transfer
from cfmerge.temporal.metrics import checked as checked
from cfmerge.temporal.metrics import geometric_mean as geometric_mean
from cfmerge.temporal.metrics import knowledge_accumulation as knowledge_accumulation
from cfmerge.temporal.metrics import table as table
from cfmerge.temporal.metrics import zero_shot_retention as zero_shot_retention
from cfmerge.temporal.replay import PerTask as PerTask
from cfmerge.temporal.replay import Reservoir as Reservoir
from cfmerge.temporal.report import Report as Report
from cfmerge.temporal.report import report_of as report_of
from cfmerge.temporal.rules import Rule as Rule
from cfmerge.temporal.rules import protocol as protocol
from cfmerge.temporal.rules import rule as rule
from cfmerge.temporal.run_steps import steps_of as steps_of
from cfmerge.temporal.setting_runs import run_setting as run_setting
from cfmerge.temporal.settings import Setting as Setting
from cfmerge.temporal.settings import published as published
from cfmerge.temporal.stages import Time as Time
from cfmerge.temporal.trajectory import Window as Window
from cfmerge.temporal.trajectory import along as along
