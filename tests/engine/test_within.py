"""Methods that look at a whole tensor first and then merge it in pieces: as if they had seen it whole."""

import numpy as np
import pytest

import cfmerge
from cfmerge.engine import cutting, orders
from cfmerge.engine.loop import Loop
from cfmerge.errors import CfmergeError

SHAPES = {"a.weight": (40, 30), "b.weight": (6, 5), "c.bias": (7,), "d.weight": (30, 20), "e.scale": (1,)}
METHODS = [
    "ties(density=0.3, variant='mergekit')",
    "ties(density=[0.1, 0.5, 0.9], scope='tensor')",
    "ties(density=0.3, scope='tensor', count='official')",
    "breadcrumbs(density=0.6, gamma=0.1)",
    "breadcrumbs_ties(density=[0.8, 0.3, 0.0], gamma=[0.1, 0.0, 0.2])",
    "della(epsilon=0.2)",
    "drop_by_rank(density=[0.5, 0.3, 0.7], epsilon=0.2) >> average",
    "sce",
    "sce(density=0.3)",
    "multislerp",
    "multislerp(normalise_weights=False, on='weights')",
    "karcher",
    "karcher(on='deltas', with_base=True)",
    "model_stock",
    "model_stock(angle='degrees', clamp=False)",
    "scale(factor=2) >> trim(density=0.2) >> average >> scale(factor=0.5)",
]

APART = (
    "breadcrumbs(density=0.6, gamma=0.1)",
    "sce(density=0.3)",
    "della(epsilon=0.2)",
)  # without ties in the core too


def models(decimals):
    """A base and three experts, whose deltas have many ties if rounded."""
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}

    def moved(tensor):
        delta = 0.1 * rng.standard_normal(tensor.shape)
        return (np.round(tensor, 1) + np.round(delta, decimals)).astype(np.float32)

    base = {name: np.round(tensor, 1).astype(np.float32) for name, tensor in base.items()}
    return [base, *({name: moved(tensor) for name, tensor in base.items()} for _ in range(3))]


@pytest.fixture(params=[2])
def family(request, make_model, tmp_path):
    trees = models(request.param)
    paths = [make_model(tmp_path / "in" / f"m{n}", tree, None) for n, tree in enumerate(trees)]
    return trees, paths


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *((method, 2) for method in METHODS),
        *(pytest.param(method, 8, marks=() if method in APART else pytest.mark.long) for method in METHODS),
    ],
    indirect=["family"],
)
def test_pieces_are_merged_as_the_whole(family, tmp_path, load, monkeypatch, method):
    """In rows of whole tensors, in pieces, and in pieces of which a sample brackets the order statistics."""
    trees, (base, *experts) = family
    named = {path.name: tree for path, tree in zip(experts, trees[1:], strict=True)}  # random keys are of names
    expected = cfmerge.merge_params(trees[0], named, method)
    cfmerge.merge(base, experts, method, output=tmp_path / "rows")
    monkeypatch.setattr(cutting, "ROW", 16)
    monkeypatch.setattr(cutting, "ENTRIES", 64)
    cfmerge.merge(base, experts, method, output=tmp_path / "pieces")
    monkeypatch.setattr(orders, "BLOCK", 8)
    monkeypatch.setattr(orders, "BLOCKS", 20)
    monkeypatch.setattr("cfmerge.engine.within.SMALL", 100)
    cfmerge.merge(base, experts, method, output=tmp_path / "sampled")
    for run in ("rows", "pieces", "sampled"):
        merged = load(tmp_path / run)
        for name, tensor in expected.items():
            np.testing.assert_allclose(merged[name], np.asarray(tensor), rtol=0, atol=1e-6, err_msg=f"{run} {name}")


def _on_spheres():
    """Three experts by kind: near each other, or about as long as the base; scaled; opposite; zero; one much longer."""
    rng = np.random.default_rng(1)
    base = rng.standard_normal((20, 30))
    near = [base + 1e-3 * rng.standard_normal(base.shape) for _ in range(3)]
    far = [rng.standard_normal(base.shape) for _ in range(3)]
    kinds = {
        "near": (base, *near), "far": (base, *far), "huge": [1e25 * array for array in (base, *near)],
        "tiny": [1e-25 * array for array in (base, *far)], "opposite": (0 * base, far[0], -far[0], 0 * base),
        "none": [0 * base] * 4, "longer": (0 * base, far[0], 1e3 * far[1], 1e-3 * far[2]),
        "multiples": (base, 1.5 * base, 1.5 * base + 1e-4 * far[0], 0.5 * base),
    }  # fmt: skip
    return [{kind: np.float32(models[number]) for kind, models in kinds.items()} for number in range(4)]


@pytest.mark.parametrize(
    "method",
    [
        "karcher", "karcher(on='deltas')", "multislerp", "multislerp(on='weights')", "model_stock", "slerp(t=0.3)",
        "slerp(threshold=1, on='deltas')", "nuslerp", "nuslerp(on='weights')",
    ],
)  # fmt: skip
def test_spheres_in_pieces_are_as_the_whole(tmp_path, load, make_model, monkeypatch, method):
    """Squares overflow or vanish, directions cancel, tensors are zero: what is asked once more where it must be."""
    trees = _on_spheres()
    base, *experts = [make_model(tmp_path / f"m{n}", tree, None) for n, tree in enumerate(trees)]
    if "slerp" in method.replace("multislerp", ""):
        trees, experts = trees[:3], experts[:2]
    expected = cfmerge.merge_params(trees[0], trees[1:], method)
    monkeypatch.setattr(cutting, "ROW", 16)
    monkeypatch.setattr(cutting, "ENTRIES", 256)
    cfmerge.merge(base, experts, method, output=tmp_path / "out")
    merged = load(tmp_path / "out")
    for name, tensor in expected.items():
        size = max(np.abs(tree[name] - trees[0][name]).max() for tree in trees[1:])  # of the deltas
        np.testing.assert_allclose(merged[name], np.asarray(tensor), rtol=2e-7, atol=2e-6 * size, err_msg=name)


@pytest.mark.parametrize(("kind", "passes"), [("near", 2), ("huge", 3), ("opposite", 3)])
def test_what_is_known_is_not_asked(tmp_path, make_model, monkeypatch, kind, passes):
    """A mean on the sphere needs one look; another where squares overflow, or where directions cancel."""
    trees = [{kind: tree[kind]} for tree in _on_spheres()[:3]]
    base, *experts = [make_model(tmp_path / f"m{n}", tree, None) for n, tree in enumerate(trees)]
    monkeypatch.setattr(cutting, "ROW", 16)
    monkeypatch.setattr(cutting, "ENTRIES", 256)
    seen, pass_over = [], Loop.passed_over

    def counted(loop, unit, *others):
        seen.append(unit.entries)
        return pass_over(loop, unit, *others)

    monkeypatch.setattr(Loop, "passed_over", counted)
    cfmerge.merge(base, experts, "karcher", output=tmp_path / "out")
    assert sum(seen) == passes * trees[0][kind].size


@pytest.mark.parametrize("family", [2, 8], indirect=True, ids=["ties", "no ties"])
def test_a_bracket_that_misses_is_widened(family, tmp_path, load, monkeypatch):
    """A sample that does not see the largest entries: above the bracket, and below it."""
    trees, (base, *experts) = family
    monkeypatch.setattr(cutting, "ROW", 16)
    monkeypatch.setattr(cutting, "ENTRIES", 64)
    monkeypatch.setattr("cfmerge.engine.within.SMALL", 100)
    for share in (0.02, 0.98):
        method = f"trim(density={share}) >> average"
        expected = cfmerge.merge_params(trees[0], trees[1:], method)
        for number, (low, high) in enumerate([(0, 1), (2**31 - 2, 2**31 - 1)]):
            monkeypatch.setattr(orders, "_bracket", lambda ranks, *_, low=low, high=high: (
                np.full(ranks.shape, low, np.uint64), np.full(ranks.shape, high, np.uint64)
            ))  # fmt: skip
            cfmerge.merge(base, experts, method, output=tmp_path / f"{share}-{number}")
            merged = load(tmp_path / f"{share}-{number}")
            for name, tensor in expected.items():
                np.testing.assert_allclose(merged[name], np.asarray(tensor), rtol=0, atol=2e-7)


def test_numbers_by_depth_and_tensor_share_what_is_compiled(family, tmp_path, load):
    trees, (base, *experts) = family
    rules = [{"match": "b.*", "method": "ties", "parameters": {"density": 0.7, "variant": "mergekit"}}]
    options = {"rules": rules, "parameters": {"density": 0.2, "variant": "mergekit"}}
    cfmerge.merge(base, experts, "ties", output=tmp_path / "out", **options)
    merged = load(tmp_path / "out")
    for part, density in (("b.weight", 0.7), ("a.weight", 0.2)):
        expected = cfmerge.merge_params(trees[0], trees[1:], f"ties(density={density}, variant='mergekit')")
        np.testing.assert_allclose(merged[part], np.asarray(expected[part]), rtol=0, atol=2e-7)


def test_what_is_not_finite_is_named(family, make_model, tmp_path):
    trees, (base, *experts) = family
    broken = {name: tensor.copy() for name, tensor in trees[2].items()}
    broken["d.weight"][3, 4] = np.nan
    experts[1] = make_model(tmp_path / "broken", broken, None)
    with pytest.raises(CfmergeError, match=r"broken.*'d.weight' holds NaN"):
        cfmerge.merge(base, experts, "ties(variant='mergekit')", output=tmp_path / "out")
