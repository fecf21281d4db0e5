"""Results that are not one checkpoint: EMR, TALL masks, TSV-Compress, SMILE; tangent model composition.

    from cfmerge import compose
    made = compose.build(base, experts, "emr", output="composed")      from checkpoints, streamed; or from trees
    made = compose.load("composed")
    made.materialise(task, base_tree), made.apply(function, base_tree, task, inputs)
    compose.materialise("composed", task, "model")                     a checkpoint

See docs/compose.md.
"""

from cfmerge.compose.artifact import Artifact as Artifact
from cfmerge.compose.artifact import load as load
from cfmerge.compose.build import build as build
from cfmerge.compose.build import build_recipe as build_recipe
from cfmerge.compose.planned import plan as plan
from cfmerge.compose.tasks import TaskSource as TaskSource
from cfmerge.compose.tasks import materialise as materialise
