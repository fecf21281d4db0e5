"""Results that are not one checkpoint: EMR, TALL masks, TSV-Compress, SMILE; tangent model composition.

    from cfmerge import compose
    made = compose.build(base, experts, "emr", output="composed")      from checkpoints, streamed; or from trees
    made = compose.load("composed")
    made.materialise(task, base_tree), made.apply(function, base_tree, task, inputs)
    compose.materialise("composed", task, "model")                     a checkpoint

    compose.Tangents(base).add("birds", tangent).apply(function, inputs)
    compose.tangent_files, compose.tangent_training                    saved and loaded; linearised fine-tuning

    compose.smile, compose.smile_flax                                  SMILE's layers; in NNX and linen models

See docs/compose.md, docs/smile.md, docs/tangents.md.
"""

from cfmerge.compose import emr as emr
from cfmerge.compose import tall as tall
from cfmerge.compose import tsv as tsv
from cfmerge.compose.artifact import Artifact as Artifact
from cfmerge.compose.artifact import load as load
from cfmerge.compose.build import build as build
from cfmerge.compose.build import build_recipe as build_recipe
from cfmerge.compose.planned import plan as plan
from cfmerge.compose.tangents import Tangents as Tangents
from cfmerge.compose.tangents import linearised as linearised
from cfmerge.compose.tasks import TaskSource as TaskSource
from cfmerge.compose.tasks import materialise as materialise
