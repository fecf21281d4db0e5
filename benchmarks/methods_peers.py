"""The other side of methods.py: a worker that runs the peers' own functions on one tensor, where torch is installed.

    PYTHON benchmarks/methods_peers.py PEER CLONES

Nothing of theirs is here. fusion_bench is imported as it is installed; the authors' code from CLONES, a folder of their
repositories by name. It reads requests from standard input, a JSON object a line, and answers with one:

    {"do": "load", "directory": ..., "experts": 7, "double": false}          the tensor that follows
    {"do": "run", "steps": 300, "save": null}                                {"seconds": ...}

What is timed begins with deltas (or with models, where that is what the function takes) in memory.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor, nn

NAME = "mlp.c_fc.weight"  # a name that every peer takes for a matrix to be merged
CLONES = Path(sys.argv[2])
PEERS: dict[str, Callable[["Inputs"], Callable[[], Tensor]]] = {}


class Inputs(NamedTuple):
    """One canonical tensor `(out, in)` of the base, the experts' deltas, and what was measured of each expert."""

    base: Tensor
    deltas: list[Tensor]
    moments: list[Tensor]
    steps: int

    @property
    def vectors(self) -> list[dict[str, Tensor]]:
        return [{NAME: delta} for delta in self.deltas]

    @property
    def experts(self) -> list[Tensor]:
        return [self.base + delta for delta in self.deltas]


def peer(function: Callable[[Inputs], Callable[[], Tensor]]) -> Callable[[Inputs], Callable[[], Tensor]]:
    """Registers what prepares a call: `function(inputs)()` is the merged delta, and only the second call is timed."""
    PEERS[function.__name__] = function
    return function


def absent(*modules: str) -> None:
    """Modules that the peer's file imports at its top and the function at hand does not use."""
    for module in modules:
        sys.modules[module] = MagicMock()


def clone(path: str) -> None:
    """Makes a folder of a clone importable."""
    if str(CLONES / path) not in sys.path:
        sys.path.insert(0, str(CLONES / path))


def model(weight: Tensor) -> nn.Module:
    """A linear layer without a bias, as `mlp.c_fc`."""
    layer = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    whole = nn.Module()
    whole.mlp = nn.Module()
    whole.mlp.c_fc = layer
    return whole


# --- fusion_bench -------------------------------------------------------------------------------------------------


@peer
def fusion_bench_wudi(inputs: Inputs) -> Callable[[], Tensor]:
    from fusion_bench.method.wudi.wudi import wudi_merging

    return lambda: wudi_merging(inputs.vectors, accelerator="cpu", iter_num=inputs.steps)[NAME].detach()


@peer
def fusion_bench_iso_c(inputs: Inputs) -> Callable[[], Tensor]:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c

    return lambda: iso_c(inputs.vectors, accelerator="cpu")[NAME]


@peer
def fusion_bench_iso_cts(inputs: Inputs) -> Callable[[], Tensor]:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_cts

    return lambda: iso_cts(inputs.vectors, common_space_fraction=0.8, accelerator="cpu")[NAME]


@peer
def fusion_bench_tsv_m(inputs: Inputs) -> Callable[[], Tensor]:
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    return lambda: TSVM_utils.compute_and_sum_svd_mem_reduction(inputs.vectors, accelerator="cpu")[NAME]


@peer
def fusion_bench_svc(inputs: Inputs) -> Callable[[], Tensor]:
    from fusion_bench.method.singular_value_calibration import utils

    calibrate, base, experts = utils.subspace_consistency_spectral_calibration_accelerated, inputs.base, inputs.experts
    merged = base + 0.4 * sum(inputs.deltas)
    return lambda: calibrate(base, experts, merged, alpha=1.0, accelerator=torch.device("cpu")) - base


@peer
def fusion_bench_opcm(inputs: Inputs) -> Callable[[], Tensor]:
    absent("fusion_bench.taskpool")
    import lightning as L
    from fusion_bench.method.opcm.opcm_general import OPCM

    base, models = model(inputs.base), [model(expert) for expert in inputs.experts]
    pool = SimpleNamespace(
        load_pretrained_model=lambda: base, load_model=models.__getitem__, model_names=list(range(len(models)))
    )
    algorithm = OPCM(alpha=0.5, shuffle_order=False, save_on_every_step=False)
    algorithm._fabric_instance = L.Fabric(accelerator="cpu", devices=1)
    OPCM.log_dir = None
    return lambda: algorithm.run(pool).mlp.c_fc.weight.data - inputs.base


@peer
def fusion_bench_regmean(inputs: Inputs) -> Callable[[], Tensor]:
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

    experts, grams = {NAME: inputs.experts}, [{NAME.removesuffix(".weight"): gram} for gram in inputs.moments]
    return lambda: merging_with_regmean_weights(experts, grams, 0.9)[NAME] - inputs.base


@peer
def fusion_bench_fisher(inputs: Inputs) -> Callable[[], Tensor]:
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights

    experts, fishers = {NAME: inputs.experts}, [{NAME: fisher} for fisher in inputs.moments]
    weights = torch.ones(len(fishers), dtype=inputs.base.dtype) / len(fishers)
    return lambda: (
        merging_with_fisher_weights(experts, fishers, weights, normalize_fisher_weight=False)[NAME] - inputs.base
    )


# --- the authors --------------------------------------------------------------------------------------------------


def by_config(module_path: str, module: str, function: str) -> Callable[[Inputs], Callable[[], Tensor]]:
    """A function `(task vectors, config)`, as the repositories that grew from tall_masks have them."""

    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        clone(module_path)
        call = getattr(__import__(module), function)
        vectors = [SimpleNamespace(vector=vector) for vector in inputs.vectors]
        options = SimpleNamespace(common_space_fraction=0.8)
        config = SimpleNamespace(DATASETS=list(range(len(vectors))), device="cpu", method=options)
        return lambda: call(vectors, config)[NAME]

    return prepare


PEERS["authors_iso_c"] = by_config("iso-merging/src/utils", "iso", "iso_c")
PEERS["authors_iso_cts"] = by_config("iso-merging/src/utils", "iso", "iso_cts")
PEERS["authors_tsv_m"] = by_config("task_singular_vectors/src/utils", "TSVM_utils", "compute_and_sum_svd_mem_reduction")
PEERS["authors_dc_merge"] = by_config("DC-Merge/vision_fft_merge/src/utils", "DC_utils", "dc_merge")


def of_actmat(function: str) -> Callable[[Inputs], Callable[[], Tensor]]:
    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        clone("actmat")
        from src import merging

        call, deltas = getattr(merging, function), torch.stack(inputs.deltas)
        return torch.no_grad()(lambda: call(deltas))

    return prepare


PEERS["authors_actmat"] = of_actmat("merge_actmat")
PEERS["authors_tact"] = of_actmat("merge_tact")


def of_swudi(function: str, **options: object) -> Callable[[Inputs], Callable[[], Tensor]]:
    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        clone("MLLMerging/LLaMA-Factory")
        import swudi_aswudi

        call, base, experts = getattr(swudi_aswudi, function), model(inputs.base), list(map(model, inputs.experts))
        return lambda: call(base, experts, [], merge_device="cpu", **options)[NAME] - inputs.base

    return prepare


PEERS["authors_swudi"] = of_swudi("swudi_merge", exp_time=1300.0)
PEERS["authors_aswudi"] = of_swudi("aswudi_merge")


@peer
def authors_optmerge(inputs: Inputs) -> Callable[[], Tensor]:
    """Their 300 steps are in the function; `.cuda()` is made to stay where it is, the script below it to do nothing."""
    clone("MLLMerging/LLaMA-Factory")
    absent("PIL", "qwen_vl_utils", "transformers")
    sys.modules["qwen_vl_utils"].process_vision_info.return_value = [], []
    from model_merging import wudi_merging2

    Tensor.cuda = lambda self: self  # type: ignore[method-assign, assignment]
    base, experts = model(inputs.base), [model(expert) for expert in inputs.experts]
    return lambda: wudi_merging2(base, experts, [])[NAME].detach() - inputs.base


@peer
def authors_star(inputs: Inputs) -> Callable[[], Tensor]:
    clone("STAR")
    from merger.STAR import star_task_vectors

    vectors = dict(enumerate(inputs.vectors))
    return lambda: sum(vector[NAME] for vector in star_task_vectors(vectors, 40).values()) / len(vectors)


@peer
def authors_cart(inputs: Inputs) -> Callable[[], Tensor]:
    clone("CART")
    absent("ray", "wandb", "pandas", "src.dataset.common", "src.dataset.registry", "src.dataset", "src.eval")
    absent("src.models.heads", "src.models.modeling", "src.utils", "src.logger")
    from src.merging import StaticMergeModule, TaskVector

    settings = {"initial_rank_ratio": 0.08, "prior": 1.0, "tasks": inputs.deltas, "device": "cpu"}
    merger = StaticMergeModule(
        SimpleNamespace(**settings), model(inputs.base), [TaskVector(vector=vector) for vector in inputs.vectors]
    )

    @torch.no_grad()
    def run() -> Tensor:
        merger._merge_weights("CART")
        return merger._merged_state_dict[NAME] - inputs.base

    return run


@peer
def authors_orthomerge(inputs: Inputs) -> Callable[[], Tensor]:
    """Their functions in the order of their script, which does the same from and to files; residuals times 0.2."""
    clone("OrthoMerge/merge")
    absent("transformers")
    import OrthoMerge_G_TA as script

    base, experts = inputs.base, inputs.experts

    def run() -> Tensor:
        skews = [script.cayley_to_skew(script.orthogonal_procrustes_torch_right(expert, base)) for expert in experts]
        rotated = base @ script.cayley_from_skew(script.merge_cayley_Q_list(skews))
        rest = [
            expert - base @ script.cayley_from_skew(skew).to(base.dtype)
            for expert, skew in zip(experts, skews, strict=True)
        ]
        return rotated + 0.2 * sum(rest) - base

    return run


# --- the worker ---------------------------------------------------------------------------------------------------


def load(request: dict) -> Inputs:
    directory, dtype = Path(request["directory"]), np.float64 if request["double"] else np.float32

    def read(name: str) -> Tensor:
        return torch.from_numpy(np.load(directory / f"{name}.npy").astype(dtype))

    numbers, kind = range(request["experts"]), request["moments"]
    moments = [read(f"{kind}_{number}") for number in numbers] if kind else []
    return Inputs(read("base"), [read(f"delta_{number}") for number in numbers], moments, 0)


def run(prepare: Callable[[Inputs], Callable[[], Tensor]], inputs: Inputs, request: dict) -> dict:
    call = prepare(inputs._replace(steps=request["steps"]))
    started = time.perf_counter()
    merged = call()
    seconds = time.perf_counter() - started
    if request["save"]:
        np.save(request["save"], merged.numpy())
    return {"seconds": seconds}


def serve(answer: Callable[[dict], dict]) -> None:
    """Answers requests, a JSON object a line, until the input ends; what a peer raises is an answer too."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # peers print
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except Exception as error:  # theirs may raise anything; it goes into the table
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
        print(json.dumps(found), file=answers, flush=True)


def main() -> None:
    prepare, inputs = PEERS[sys.argv[1]], None

    def answer(request: dict) -> dict:
        nonlocal inputs
        if request["do"] == "load":
            inputs = load(request)
            return {"threads": torch.get_num_threads()}
        return run(prepare, inputs, request)

    serve(answer)


if __name__ == "__main__":
    main()
