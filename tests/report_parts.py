"""Data for tests of pages: measured tensors out of random matrices, and all that the page of a merge tells."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cfmerge.diagnosis import Diagnosis, Finding, Measured, Recommendation
from cfmerge.report.page.layers import without_last
from cfmerge.report.page.merge import Input, Merge, Tensor

EXPERTS = ("math", "code", "an-expert-of-a-long-name")


def measured(
    base: np.ndarray, deltas: Sequence[np.ndarray], kind: str = "matrix", layer: int | None = None
) -> Measured:
    """The numbers of a tensor that the pages show."""
    flat = np.stack([delta.ravel() for delta in deltas])
    signs = np.sign(flat)
    conflicts = np.mean(signs[:, None] != signs[None], axis=2)
    gram = flat @ flat.T
    found = Measured(
        kind, base.shape, layer, float(np.linalg.norm(base)), np.linalg.norm(flat, axis=1), flat @ base.ravel(), gram,
        conflicts,
    )  # fmt: skip
    if kind != "matrix":
        return found
    count, spectra = len(deltas), np.array([np.linalg.svd(delta, compute_uv=False) for delta in deltas])
    return dataclasses.replace(
        found, spectra=spectra, base_spectrum=np.linalg.svd(base, compute_uv=False),
        stable_ranks=np.sum(spectra**2, 1) / np.maximum(spectra[:, 0], 1e-30) ** 2, effective_ranks=np.full(count, 3.0),
        ranks=np.full(count, 4.0), rows=np.eye(count), columns=np.eye(count), leading=np.full(count, 0.5),
        lesser=np.full(count, 0.4), null=np.full(count, 0.1), sides=base.shape, growth=1.3,
    )  # fmt: skip


def tensors(layers: int = 3, experts: int = len(EXPERTS), seed: int = 0) -> dict[str, Measured]:
    """Tensors of a model with some layers; the last delta is that of the experts' average."""
    random = np.random.default_rng(seed)

    def one(shape: tuple[int, ...], kind: str, layer: int | None) -> Measured:
        deltas = [0.1 * random.standard_normal(shape) for _ in range(experts)]
        return measured(random.standard_normal(shape), [*deltas, np.mean(deltas, axis=0)], kind, layer)

    found = {"model.embed_tokens.weight": one((12, 4), "embedding", None)}
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        found[f"{stem}.mlp.up_proj.weight"] = one((6, 4), "matrix", layer)
        found[f"{stem}.self_attn.a_projection_whose_name_is_long.weight"] = one((4, 4), "matrix", layer)
        found[f"{stem}.input_layernorm.weight"] = one((4,), "vector", layer)
    return found


def told(layers: int = 3, **changed: object) -> Merge:
    """A merge by `average`, with a block of every kind on its page."""
    numbers = tensors(layers)
    alone = without_last(numbers)
    findings = (
        Finding("foreign-base", "grave", "code does not come from this base <b>", 1.3, ("code",), tuple(alone)),
        Finding("growth", "warning", "least squares would grow 3 times", 3.0),
        Finding("conflicts", "fact", "signs conflict in 49 % of the entries", 0.49),
    )
    recommended = Recommendation("dc_merge", "growth is above its bound", "docs/results: 89.2 against 33.3 of ace")
    recipe = "base: base\nexperts:\n- math\n- code\nmethod: average\n"
    merge = Merge(
        "merged", True, "average", "The mean of the deltas.", EXPERTS, recipe, recipe + "seed: 0\n",
        [("embedding", "average", 1), ("matrix", "average", 2 * layers), ("vector", "average", layers)],
        warnings=["The merged model is long:\n  cfmerge merge merged/README.md -m dc_merge -o other"],
        notes=["expert 'code': `lm_head.weight` is not there"], lacking=["Something was not measured."],
        facts={"Tensors": "10", "Size": "748.2 MB in 2 files"},
        inputs=[Input(name, "1", "model-00001-of-00002.safetensors", "67f77108" * 8, "unchanged") for name in EXPERTS],
        versions="cfmerge 0.1.0, jax 0.10.2", measured=numbers,
        tensors=[Tensor(name, one.kind, one.shape, "bfloat16", "average") for name, one in numbers.items()],
        diagnosis=Diagnosis("base", EXPERTS, alone, findings, recommended, ("no spectra of embeddings",)),
    )  # fmt: skip
    return dataclasses.replace(merge, **changed)  # type: ignore[arg-type]
