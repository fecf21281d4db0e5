"""The programs that peers.py measures where a peer has no command of its own; they run in the peer's environment.

    PYTHON benchmarks/peers_programs.py fusion_bench METHOD OUT BASE EXPERT [EXPERT ...]
    PYTHON benchmarks/peers_programs.py ace CLONE OUT BASE EXPERT [EXPERT ...]

Nothing of theirs is here. Each program does as the peer's documentation says: fusion_bench has a pool of models that it
loads when it wants them, and saves the merged one; the authors of ACE hold all task vectors and merge layer by layer.
Both compute in float32 and write bfloat16, as cfmerge does with these models.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

EMBEDDINGS = ["model.embed_tokens.weight", "lm_head.weight"]  # are averaged, here as there


def algorithm(name: str) -> Any:
    """One of fusion_bench's algorithms, with the settings that cfmerge's method has."""
    from fusion_bench import method as found
    from fusion_bench.method.magmax.magmax import MagMaxAlgorithm

    made: dict[str, Callable[[], Any]] = {
        "average": lambda: found.SimpleAverageAlgorithm(),
        "task_arithmetic": lambda: found.TaskArithmeticAlgorithm(scaling_factor=0.3),
        "ties": lambda: found.TiesMergingAlgorithm(0.3, threshold=20, remove_keys=[], merge_func="sum"),
        "tsv_m": lambda: found.TaskSingularVectorMerging(alpha=1.0, exclude_keys=EMBEDDINGS),
        "iso_c": lambda: found.ISO_C_Merge(scaling_factor=1.0, exclude_keys=EMBEDDINGS),
        "magmax": lambda: MagMaxAlgorithm(scaling_factor=0.5),
    }
    return made[name]()


def fusion_bench(name: str, out: str, base: str, *experts: str) -> None:
    from fusion_bench.modelpool import CausalLMPool

    models = {"_pretrained_": base} | {f"expert_{number}": path for number, path in enumerate(experts)}
    pool = CausalLMPool(models, tokenizer=None, model_kwargs={"torch_dtype": "float32"})
    merged = algorithm(name).run(pool)
    merged.to(torch.bfloat16).save_pretrained(out)


def ace(clone: str, out: str, base: str, *experts: str) -> None:
    from types import SimpleNamespace

    from safetensors.torch import load_file, save_file

    sys.path.insert(0, clone)
    from src.merge.strategy import MergeStrategy

    def read(folder: str) -> dict[str, torch.Tensor]:
        return load_file(Path(folder) / "model.safetensors")

    start = read(base)
    vectors = [
        SimpleNamespace(task_vector_param_dict={name: tensor.float() - start[name].float() for name, tensor in expert})
        for expert in (read(path).items() for path in experts)
    ]
    of_matrices = [name for name, tensor in start.items() if tensor.ndim == 2 and name not in EMBEDDINGS]
    rest = [name for name in start if name not in of_matrices]
    merged = MergeStrategy(of_matrices, vectors, "cpu").ace_merging()
    merged |= MergeStrategy(rest, vectors, "cpu").average_merging()
    result = {name: (tensor.float() + merged[name]).to(tensor.dtype).contiguous() for name, tensor in start.items()}
    Path(out).mkdir()
    save_file(result, Path(out) / "model.safetensors", {"format": "pt"})
    shutil.copy(Path(base) / "config.json", out)


def main(words: Sequence[str]) -> None:
    {"fusion_bench": fusion_bench, "ace": ace}[words[0]](*words[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
