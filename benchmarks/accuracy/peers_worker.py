"""The other side of peers.py: a worker that merges models with the peers' own code, where torch is installed.

    PYTHON benchmarks/accuracy/peers_worker.py PACKAGE CLONES

Nothing of theirs is here. A peer is a function of whole models, below, or one of the functions of a single matrix in
../methods_peers.py, which is then called for every matrix. Requests come in by standard input, a JSON object a line,
and each is answered with one:

    {"do": "versions", "packages": ["torch", ...]}                           {"torch": "2.6.0", ...}
    {"do": "merge", "peer": ..., "directory": ..., "experts": 8,             {"seconds": ...}
     "names": [...], "moments": "gram", "double": false, "save": ...}

The directory has `base.npz`, `expert_K.npz` and what was measured, `gram_K.npz` or `fisher_K.npz`, matrices as
`(out, in)`; saved are the merged deltas of the named tensors, in an npz file.
"""

import contextlib
import importlib.metadata
import logging
import re
import sys
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from methods_peers import CLONES, PEERS, Inputs, absent, clone, serve

State = dict[str, Tensor]
STEPS = 300  # of Adam, as published
MODELS: dict[str, Callable[["Models"], State]] = {}


class Models(NamedTuple):
    """State dicts of the base and the experts, and what was measured of each expert, by the same names."""

    base: State
    experts: list[State]
    moments: list[State]

    @property
    def deltas(self) -> list[State]:
        return [{name: expert[name] - tensor for name, tensor in self.base.items()} for expert in self.experts]

    @property
    def vectors(self) -> Tensor:
        """The deltas as rows, `(experts, entries of the model)`."""
        return torch.stack([torch.cat([tensor.reshape(-1) for tensor in delta.values()]) for delta in self.deltas])

    @property
    def modules(self) -> dict[str, nn.Module]:
        """As fusion_bench wants a pool of models."""
        return {"_pretrained_": module(self.base)} | {str(k): module(state) for k, state in enumerate(self.experts)}

    def split(self, vector: Tensor) -> State:
        """A vector of the whole model as a state dict."""
        parts = torch.split(vector, [tensor.numel() for tensor in self.base.values()])
        return {name: part.reshape(self.base[name].shape) for name, part in zip(self.base, parts, strict=True)}

    def minus_base(self, merged: State) -> State:
        return {name: merged[name].detach().double() - tensor.double() for name, tensor in self.base.items()}


def whole(function: Callable[[Models], State]) -> Callable[[Models], State]:
    """Registers `function(models)`, which returns the merged delta."""
    MODELS[function.__name__] = function
    return function


def module(state: State) -> nn.Module:
    """One leaf for each tensor, a linear layer for each matrix; their names have slashes, so that they are no paths."""
    root = nn.Module()
    for name, tensor in state.items():
        leaf = nn.Module() if tensor.ndim != 2 else nn.Linear(1, 1, bias=False)
        leaf.weight = nn.Parameter(tensor.clone())
        root.add_module(name, leaf)
    return root


def state_of(merged: nn.Module) -> State:
    return {name.removesuffix(".weight"): tensor for name, tensor in merged.state_dict().items()}


# --- fusion_bench -------------------------------------------------------------------------------------------------


@whole
def fusion_bench_average(models: Models) -> State:
    from fusion_bench.method.simple_average import simple_average

    return models.minus_base(simple_average([dict(state) for state in models.experts]))


@whole
def fusion_bench_task_arithmetic(models: Models) -> State:
    from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm

    return models.minus_base(state_of(TaskArithmeticAlgorithm(scaling_factor=0.3).run(models.modules)))


@whole
def fusion_bench_ties(models: Models) -> State:
    from fusion_bench.method.ties_merging import TiesMergingAlgorithm

    algorithm = TiesMergingAlgorithm(scaling_factor=0.3, threshold=20, remove_keys=[], merge_func="sum")
    return models.minus_base(state_of(algorithm.run(models.modules)))


@whole
def fusion_bench_magmax(models: Models) -> State:
    from fusion_bench.method.magmax import magmax_merge

    base, *experts = models.modules.values()
    return models.minus_base(state_of(magmax_merge(base, experts, scaling_factor=0.5)))


@whole
def fusion_bench_model_stock(models: Models) -> State:
    from fusion_bench import BaseModelPool
    from fusion_bench.method.model_stock import ModelStock

    return models.minus_base(state_of(ModelStock().run(BaseModelPool(models.modules))))


@whole
def fusion_bench_consensus(models: Models) -> State:
    """Their masks; their count of two votes reads files, so it stands here."""
    from fusion_bench.method.tall_mask.utils import generate_task_masks

    vectors, base = models.vectors, torch.cat([tensor.reshape(-1) for tensor in models.base.values()])
    masks = generate_task_masks(vectors, base + vectors, base, tall_mask_lambda=0.4)
    return models.split(0.3 * vectors.sum(0) * (masks.sum(0) >= 2))


@whole
def fusion_bench_fisher(models: Models) -> State:
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights

    dtype = next(iter(models.base.values())).dtype
    weights = torch.ones(len(models.experts), dtype=dtype) / len(models.experts)
    experts = {name: [state[name] for state in models.experts] for name in models.base}
    merged = merging_with_fisher_weights(experts, models.moments, weights, normalize_fisher_weight=False)
    return models.minus_base(merged)


@whole
def fusion_bench_opcm(models: Models) -> State:
    absent("fusion_bench.taskpool")
    import lightning as L
    from fusion_bench.method.opcm.opcm_general import OPCM

    base, *experts = models.modules.values()
    pool = types.SimpleNamespace(
        load_pretrained_model=lambda: base, load_model=experts.__getitem__, model_names=list(range(len(experts)))
    )
    algorithm = OPCM(alpha=0.5, shuffle_order=False, save_on_every_step=False)
    algorithm._fabric_instance = L.Fabric(accelerator="cpu", devices=1)
    OPCM.log_dir = None
    return models.minus_base(state_of(algorithm.run(pool)))


@whole
def fusion_bench_expo(models: Models) -> State:
    from fusion_bench.method.linear.expo import expo_merge

    base, expert = models.modules.values()
    return models.minus_base(state_of(expo_merge(base, expert, extrapolation_factor=0.1)))


# --- mergekit -----------------------------------------------------------------------------------------------------


def mergekit(name: str, with_base: bool = True, **parameters: object) -> None:
    def merge(models: Models) -> State:
        from mergekit.merge_methods.api import merge_state_dicts

        given: dict[str, State] = {"base": models.base} if with_base else {}
        given |= {f"expert {number}": state for number, state in enumerate(models.experts)}
        base = "base" if with_base else None
        return models.minus_base(merge_state_dicts(given, name, parameters=parameters, base=base))

    MODELS[f"mergekit_{name}"] = merge


mergekit("linear", with_base=False, weight=1.0)
mergekit("task_arithmetic", weight=1.0, **{"lambda": 0.3})
mergekit("ties", weight=1.0, density=0.2)
mergekit("breadcrumbs", weight=1.0, density=0.9, gamma=0.01, **{"lambda": 0.3})
mergekit("breadcrumbs_ties", weight=1.0, density=0.9, gamma=0.01)
mergekit("sce", select_topk=0.5)
mergekit("ram")
mergekit("ramplus_tl")
mergekit("karcher", with_base=False)
mergekit("multislerp", weight=1.0)
mergekit("model_stock")
mergekit("slerp", t=0.5)
mergekit("nuslerp", weight=1.0)
mergekit("nearswap", t=1e-4)
mergekit("arcee_fusion")


# --- the authors --------------------------------------------------------------------------------------------------


@whole
def authors_ties(models: Models) -> State:
    clone("ties-merging")
    absent("matplotlib", "matplotlib.pyplot", "transformers")
    plots = types.ModuleType("src.utils.analysis_utils")  # from which their file has `logging`
    vars(plots)["logging"] = logging
    sys.modules[plots.__name__] = plots
    from src.utils.merge_utils import merge_methods

    return models.split(merge_methods("topk", models.vectors, 20, "mass", "dis-mean"))


@whole
def authors_pcb(models: Models) -> State:
    """Their file goes on with a search on data, which ends at the first name that it does not have."""
    path = CLONES / "pcb-merging" / "pcb-merging.py"
    names: dict[str, Any] = {}
    with contextlib.suppress(NameError):
        exec(compile(path.read_text(), path.name, "exec"), names)
    merged, _, _ = names["PCB_merge"](models.vectors, pcb_ratio=0.1)
    return models.split(1.2 * merged)


@whole
def authors_metagpt(models: Models) -> State:
    """As the authors of STAR have it, for comparison."""
    clone("STAR")
    from merger.metagpt import metagpt_get_merged_tv

    return metagpt_get_merged_tv(models.deltas)


@whole
def authors_lines(models: Models) -> State:
    """Of task arithmetic; their rule for alpha stands above their call. Blocks are known by a number between dots."""
    clone("LiNeS")
    absent("wandb", "src.datasets.common", "src.datasets.registry", "src.models.heads", "src.models.modeling")
    absent("src.models.task_vectors", "src.utils")
    from src.eval.eval import LiNeS_scaling

    dotted = {re.sub(r"(?:^|[./]|_)(\d+)(?=[./]|$)", r".\1.", name, count=1): name for name in models.base}
    blocks = 1 + max(int(found[1]) for name in dotted if (found := re.search(r"\.(\d+)\.", name)))
    total = models.vectors.sum(0)
    merged = 0.3 * total
    alpha = (total.norm() / merged.norm()) * 1 / len(models.experts)
    vector = types.SimpleNamespace(vector=dict(zip(dotted, models.split(merged).values(), strict=True)))
    scaled = LiNeS_scaling(vector, alpha=alpha, beta=0.5, num_blocks=blocks)
    return {name: scaled.vector[key] for key, name in dotted.items()}


# --- the worker ---------------------------------------------------------------------------------------------------


def read(path: Path, names: Iterable[str], double: bool) -> State:
    with np.load(path) as file:
        dtype = np.float64 if double else np.float32
        return {name: torch.from_numpy(np.ascontiguousarray(file[name], dtype)) for name in names}


def merge(request: dict[str, Any]) -> dict[str, Any]:
    def state(name: str) -> State:
        return read(Path(request["directory"]) / f"{name}.npz", request["names"], request["double"])

    numbers, kind = range(request["experts"]), request["moments"]
    moments = [state(f"{kind}_{number}") for number in numbers] if kind else []
    models = Models(state("base"), [state(f"expert_{number}") for number in numbers], moments)
    started = time.perf_counter()
    if request["peer"] in MODELS:
        with torch.no_grad():
            merged = MODELS[request["peer"]](models)
    else:
        merged = one_by_one(request["peer"], models)
    seconds = time.perf_counter() - started
    np.savez(request["save"], **{name: tensor.double().numpy() for name, tensor in merged.items()})
    return {"seconds": seconds}


def one_by_one(peer: str, models: Models) -> State:
    """Matrix by matrix."""
    deltas, merged = models.deltas, {}
    for name, base in models.base.items():
        moments = [moment[name] for moment in models.moments]
        merged[name] = PEERS[peer](Inputs(base, [delta[name] for delta in deltas], moments, STEPS))().detach()
    return merged


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def answer(request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "versions":
        return {package: version(package) for package in request["packages"]}
    return merge(request)


if __name__ == "__main__":
    serve(answer)
