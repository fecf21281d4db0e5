"""The programs that composed.py measures in fusion_bench's environment.

    PYTHON benchmarks/composed_peers.py emr|tall|smile BASE EXPERT [EXPERT ...]

Nothing of theirs is here: their own functions are called on the state dicts of the files, as their algorithms do. They
print the seconds of the call alone, and of reading the files; nothing is written.
"""

import re
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

FULL = True  # their default: U and V with all columns
LINEAR = re.compile(r"_proj\.weight$")
States = list[dict[str, torch.Tensor]]


def emr(base: dict[str, torch.Tensor], experts: States) -> None:
    from fusion_bench.method.emr_merging.utils import emr_merge

    emr_merge([{name: tensor - base[name] for name, tensor in expert.items()} for expert in experts])


def tall(base: dict[str, torch.Tensor], experts: States) -> None:
    from fusion_bench.method.tall_mask.utils import generate_task_masks

    def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([state[name].reshape(-1) for name in sorted(state)])

    start, tuned = flat(base), torch.stack([flat(expert) for expert in experts])
    generate_task_masks(tuned - start, tuned, start, tall_mask_lambda=0.4)


def smile(base: dict[str, torch.Tensor], experts: States) -> None:
    from fusion_bench.models.smile_moe.linear_from_module import SmileMoELinear

    def linear(weight: torch.Tensor) -> nn.Linear:
        made = nn.Linear(*weight.shape[::-1], bias=False)
        made.weight.data = weight
        return made

    with torch.no_grad():
        for name in filter(LINEAR.search, base):
            SmileMoELinear(
                linear(base[name]), [linear(expert[name]) for expert in experts], gate_k=16, k=32, top_k=1,
                routing_use_diff=True, full_matrices=FULL, upscaling_accelerator=None,
            )  # fmt: skip


def main() -> None:
    system, *paths = sys.argv[1:]
    started = time.perf_counter()
    states = [{n: t.float() for n, t in load_file(Path(path) / "model.safetensors").items()} for path in paths]
    read = time.perf_counter()
    {"emr": emr, "tall": tall, "smile": smile}[system](states[0], states[1:])
    print(f"{time.perf_counter() - read:.3f} {read - started:.3f}", file=sys.stderr)


if __name__ == "__main__":
    main()
