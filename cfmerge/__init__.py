"""cfmerge: merge fine-tuned models into one, without data and without training, in closed form.

    import cfmerge
    cfmerge.merge(base, experts, method="ace", output=...)                   checkpoints on disk, streaming
    cfmerge.merge_state_dicts(model, [a, b], "ties")                         torch modules, dicts of arrays, in memory
    cfmerge.merge_params(base_tree, expert_trees, cfmerge.methods.ace())     JAX pytrees, under jit, vmap, grad
    cfmerge.merge_tensor(W0, [W1, W2], cfmerge.methods.ace())                one canonical (out, in) weight
    cfmerge.least_squares, covariance, linalg                                what methods of one's own are made of

Importing it is light: JAX is imported when one of these is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cfmerge import align as align
    from cfmerge import compose as compose
    from cfmerge import covariance as covariance
    from cfmerge import least_squares as least_squares
    from cfmerge import linalg as linalg
    from cfmerge import methods as methods
    from cfmerge import temporal as temporal
    from cfmerge.errors import CfmergeError as CfmergeError
    from cfmerge.formats import open_checkpoint as open_checkpoint
    from cfmerge.products.accumulate import accumulate as accumulate
    from cfmerge.products.accumulate import solve as solve
    from cfmerge.products.convert import convert as convert
    from cfmerge.products.diagnose import diagnose as diagnose
    from cfmerge.products.diagnose import diagnose_recipe as diagnose_recipe
    from cfmerge.products.files import open as open
    from cfmerge.products.files import save as save
    from cfmerge.products.in_memory import merge_params as merge_params
    from cfmerge.products.in_memory import merge_tensor as merge_tensor
    from cfmerge.products.loading import load as load
    from cfmerge.products.merge import merge as merge
    from cfmerge.products.merge import merge_recipe as merge_recipe
    from cfmerge.products.plan import Plan as Plan
    from cfmerge.products.plan import make_plan as make_plan
    from cfmerge.products.plan import plan as plan
    from cfmerge.products.report import make_report as make_report
    from cfmerge.products.state_dicts import merge_state_dicts as merge_state_dicts
    from cfmerge.products.sweep import grid as grid
    from cfmerge.products.sweep import sweep as sweep
    from cfmerge.products.zipping import zip_checkpoints as zip_checkpoints
    from cfmerge.recipe import Align as Align
    from cfmerge.recipe import Expert as Expert
    from cfmerge.recipe import LayerExpert as LayerExpert
    from cfmerge.recipe import Layers as Layers
    from cfmerge.recipe import Recipe as Recipe
    from cfmerge.recipe import Rename as Rename
    from cfmerge.recipe import Rule as Rule
    from cfmerge.report.result import MergeResult as MergeResult
    from cfmerge.statistics import Statistics as Statistics

_PUBLIC = {
    "align": "cfmerge.align",
    "compose": "cfmerge.compose",
    "covariance": "cfmerge.covariance",
    "least_squares": "cfmerge.least_squares",
    "linalg": "cfmerge.linalg",
    "methods": "cfmerge.methods",
    "temporal": "cfmerge.temporal",
    "open_checkpoint": "cfmerge.formats",
    "open": "cfmerge.products.files",
    "save": "cfmerge.products.files",
    "merge_params": "cfmerge.products.in_memory",
    "merge_tensor": "cfmerge.products.in_memory",
    "merge_state_dicts": "cfmerge.products.state_dicts",
    "MergeResult": "cfmerge.report.result",
    "merge": "cfmerge.products.merge",
    "merge_recipe": "cfmerge.products.merge",
    "Plan": "cfmerge.products.plan",
    "make_plan": "cfmerge.products.plan",
    "plan": "cfmerge.products.plan",
    "make_report": "cfmerge.products.report",
    "accumulate": "cfmerge.products.accumulate",
    "solve": "cfmerge.products.accumulate",
    "convert": "cfmerge.products.convert",
    "diagnose": "cfmerge.products.diagnose",
    "diagnose_recipe": "cfmerge.products.diagnose",
    "load": "cfmerge.products.loading",
    "Statistics": "cfmerge.statistics",
    "grid": "cfmerge.products.sweep",
    "sweep": "cfmerge.products.sweep",
    "zip_checkpoints": "cfmerge.products.zipping",
    "CfmergeError": "cfmerge.errors",
    "Align": "cfmerge.recipe",
    "Expert": "cfmerge.recipe",
    "LayerExpert": "cfmerge.recipe",
    "Layers": "cfmerge.recipe",
    "Recipe": "cfmerge.recipe",
    "Rename": "cfmerge.recipe",
    "Rule": "cfmerge.recipe",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cfmerge' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    return module if module.__name__ == f"cfmerge.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
