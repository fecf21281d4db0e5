"""cfmerge: merge fine-tuned models into one, without data and without training, in closed form.

    import cfmerge
    cfmerge.merge(base, experts, method="ace", output=...)                   checkpoints on disk, streaming
    cfmerge.merge_params(base_tree, expert_trees, cfmerge.methods.ace())     JAX pytrees, under jit, vmap, grad
    cfmerge.merge_tensor(W0, [W1, W2], cfmerge.methods.ace())                one canonical (out, in) weight

Importing it is light: JAX is imported when one of these is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cfmerge import methods as methods
    from cfmerge.engine.accumulate import accumulate as accumulate
    from cfmerge.engine.accumulate import solve as solve
    from cfmerge.engine.in_memory import merge_params as merge_params
    from cfmerge.engine.in_memory import merge_tensor as merge_tensor
    from cfmerge.engine.merge import MergeResult as MergeResult
    from cfmerge.engine.merge import merge as merge
    from cfmerge.engine.merge import merge_recipe as merge_recipe
    from cfmerge.engine.plan import Plan as Plan
    from cfmerge.engine.plan import make_plan as make_plan
    from cfmerge.engine.statistics import Statistics as Statistics
    from cfmerge.engine.sweep import grid as grid
    from cfmerge.engine.sweep import sweep as sweep
    from cfmerge.errors import CfmergeError as CfmergeError
    from cfmerge.formats import open_checkpoint as open_checkpoint
    from cfmerge.recipe import Expert as Expert
    from cfmerge.recipe import Recipe as Recipe
    from cfmerge.recipe import Rule as Rule

_PUBLIC = {
    "methods": "cfmerge.methods",
    "open_checkpoint": "cfmerge.formats",
    "merge_params": "cfmerge.engine.in_memory",
    "merge_tensor": "cfmerge.engine.in_memory",
    "MergeResult": "cfmerge.engine.merge",
    "merge": "cfmerge.engine.merge",
    "merge_recipe": "cfmerge.engine.merge",
    "Plan": "cfmerge.engine.plan",
    "make_plan": "cfmerge.engine.plan",
    "accumulate": "cfmerge.engine.accumulate",
    "solve": "cfmerge.engine.accumulate",
    "Statistics": "cfmerge.engine.statistics",
    "grid": "cfmerge.engine.sweep",
    "sweep": "cfmerge.engine.sweep",
    "CfmergeError": "cfmerge.errors",
    "Expert": "cfmerge.recipe",
    "Recipe": "cfmerge.recipe",
    "Rule": "cfmerge.recipe",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cfmerge' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    return module if name == "methods" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
