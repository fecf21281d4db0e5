"""Random methods: what is drawn depends on the seed, the tensor's name and the expert's name, and on nothing else."""

import numpy as np
import pytest
import toys

import cfmerge
from cfmerge import methods
from cfmerge.core import random as _random
from cfmerge.engine import cutting
from cfmerge.errors import CfmergeError

FLOAT = np.dtype(np.float32)
METHODS = ["by_chance >> average", "by_chance(scope='tensor') >> task_arithmetic(scale=1)", "drop_by_rank >> middle"]


@pytest.fixture(scope="module", autouse=True)
def own():
    with toys.registered(toys.by_chance, toys.middle, toys.squares, toys.rows) as made:
        yield made


def weights_of(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors*")}


@pytest.fixture
def family(make_model, tmp_path):
    return toys.small_family(make_model, tmp_path / "in")


@pytest.fixture
def merge(family, tmp_path):
    """`merge(label, method, ...)`: the files of a merge of the family."""

    def run(label, method=METHODS[0], experts=None, **options):
        cfmerge.merge(family.base, experts or family.experts, method, output=tmp_path / label, **options)
        return weights_of(tmp_path / label)

    return run


@pytest.mark.parametrize("method", METHODS)
def test_order_of_experts_does_not_matter(family, merge, tmp_path, load, method):
    """To the rounding of sums of another order."""
    merge("forth", method)
    merge("back", method, dict(reversed(family.experts.items())))
    forth, back = load(tmp_path / "forth"), load(tmp_path / "back")
    for name, tensor in forth.items():
        np.testing.assert_allclose(back[name], tensor, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_in_memory_as_on_disk(family, merge, tmp_path, load, method):
    merge("disk", method, seed=7)
    again = cfmerge.merge_params(family.tensors[0], family.trees, methods.make(method), seed=7)
    for name, tensor in load(tmp_path / "disk").items():
        np.testing.assert_allclose(np.asarray(again[name]), tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_batches_and_pieces_do_not_matter(merge, monkeypatch, method):
    """Tensors by themselves, in stacks, or in pieces of three rows: the same bytes."""
    whole = merge("whole", method)
    monkeypatch.setattr(cutting, "ROW", 8)
    monkeypatch.setattr(cutting, "ENTRIES", 24)
    monkeypatch.setattr(cutting, "STACKED", 1)
    assert merge("cut", method) == whole
    assert merge("little", method, memory=24_000) == whole


def test_pieces_get_what_the_whole_gets():
    """Wherever a piece begins."""
    key = _random.key_of(3, "w", "m1")
    whole = np.asarray(_random.uniform(key, (3000,), FLOAT))
    for first in (0, 1, 1000, 2900):
        piece = np.asarray(_random.uniform(key, (min(500, whole.size - first),), FLOAT, first))
        assert np.array_equal(piece, whole[first : first + 500])
    assert np.array_equal(_random.uniform(key, (50, 2), FLOAT).reshape(-1), whole[:100])


def test_draws_are_uniform_and_do_not_depend_on_each_other():
    """Within five standard deviations: bytes, neighbours at many distances, keys that differ in one bit."""
    n = 1 << 18
    keys = [_random.key_of(seed, "w", expert) for seed, expert in ((0, "a"), (1, "a"), (0, "b"))]
    drawn = [np.asarray(_random.uniform(key, (n,), FLOAT), np.float64) for key in keys]
    for own in drawn:
        assert own.min() >= 0
        assert own.max() < 1
        for scale in (1, 1 << 8, 1 << 16):  # the leading byte, the next, the last
            counts = np.bincount((own * 256 * scale).astype(np.int64) & 255, minlength=256)
            assert abs(np.sum((counts - n / 256) ** 2) / (n / 256) - 255) < 5 * np.sqrt(2 * 255)
        for lag in (1, 2, 3, 8, 64, 1024, 65536):
            assert abs(np.corrcoef(own[:-lag], own[lag:])[0, 1]) < 5 / np.sqrt(n - lag)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(drawn[a], drawn[b])[0, 1]) < 5 / np.sqrt(n)


def test_again_and_other_seeds(merge):
    first = merge("first")
    assert merge("again") == first
    assert merge("zero", seed=0) == first
    assert merge("other", seed=1) != first
    assert merge("large", seed=_random.SEEDS - 1) != first


def test_tensors_and_experts_draw_for_themselves(own):
    """Four tensors of one shape and two experts, all deltas 1: eight different masks, in one batch."""
    base = {f"h.{n}.weight": np.zeros((16, 16), np.float32) for n in range(4)}
    one = {name: np.ones_like(tensor) for name, tensor in base.items()}
    masks = []
    for method in (own.by_chance() >> methods.average(), own.by_chance(scope="tensor") >> methods.average()):
        for names in (["a"], ["b"], ["a", "b"]):
            found = cfmerge.merge_params(base, dict.fromkeys(names, one), method)
            masks += [tensor.tobytes() for tensor in map(np.asarray, found.values())]
    assert len(set(masks[:12])) == 12
    assert masks[:12] == masks[12:]  # what a method sees it as is drawn alike


def test_an_experts_draws_do_not_depend_on_who_else_is_there(family):
    """Merging with weight 0 of the others gives the expert alone."""
    method = methods.make("by_chance >> task_arithmetic(scale=1)")
    base, others = family.tensors[0], family.trees
    alone = cfmerge.merge_params(base, {"m2": others["m2"]}, method)
    among = cfmerge.merge_params(base, others, method, weights=[0.0, 1.0, 0.0])
    for name in alone:
        np.testing.assert_allclose(np.asarray(among[name]), np.asarray(alone[name]), rtol=0, atol=1e-6)


def test_one_tensor_by_itself(own):
    """`merge_tensor` draws for a tensor called "tensor", by the experts' names."""
    base, delta = np.zeros((8, 8), np.float32), np.ones((8, 8), np.float32)
    method = own.by_chance() >> methods.average()
    found = np.asarray(cfmerge.merge_tensor(base, [delta], method, names=["math"], seed=5))
    tree = cfmerge.merge_params({"tensor": base}, {"math": {"tensor": delta}}, method, seed=5)
    assert np.array_equal(found, np.asarray(tree["tensor"]))
    draws = np.asarray(_random.uniform(_random.key_of(5, "tensor", "math"), (8, 8), FLOAT))
    assert np.array_equal(found, (draws >= 0.5).astype(np.float32))


def test_precision_does_not_change_the_draws(merge, tmp_path, load):
    merge("single", precision="float32")
    merge("double", precision="float64")
    single, double = load(tmp_path / "single"), load(tmp_path / "double")
    for name, tensor in single.items():
        np.testing.assert_allclose(double[name], tensor, rtol=0, atol=1e-6)


def test_stacked_layers_draw_for_themselves(own):
    """Three layers in one tensor: each is a matrix with a key of its own, and is not its neighbour."""
    base = {"layers/w": np.zeros((3, 16, 16), np.float32)}
    expert = {"layers/w": np.ones((3, 16, 16), np.float32)}
    rules = [{"match": "layers/w", "layout": "boi"}]
    method = own.by_chance(scope="tensor") >> methods.average()
    found = np.asarray(cfmerge.merge_params(base, {"a": expert}, method, rules=rules)["layers/w"])
    assert len({layer.tobytes() for layer in found}) == 3
    draws = np.asarray(_random.uniform(_random.key_of(0, "layers/w[2]", "a"), (16, 16), FLOAT))
    assert np.array_equal(found[2], (draws >= 0.5).astype(np.float32))


@pytest.mark.parametrize("seed", [-1, 1 << 31, 1 << 40])
def test_seeds_that_would_differ_from_place_to_place(family, refused, seed):
    refused(["seed", str(seed)], family.base, family.experts, METHODS[0], seed=seed)
    with pytest.raises(CfmergeError, match="seed"):
        cfmerge.merge_params(family.tensors[0], family.trees, methods.make(METHODS[0]), seed=seed)


@pytest.mark.parametrize(
    "layout",
    ["oi", "io"],
)
def test_beside_a_method_that_wants_matrices(own, layout):
    """In a sweep too: though the other method sees (out, in), what is drawn stays the same."""
    base = {"w": np.zeros((6, 5), np.float32)}
    generator = np.random.default_rng(0)
    experts = {name: {"w": generator.standard_normal((6, 5)).astype(np.float32)} for name in "ab"}
    rules = [{"match": "w", "layout": layout}]
    random = own.by_chance() >> methods.average()
    by = {"random": random, "squares": own.squares(), "rows": own.rows() >> methods.average()}
    found = cfmerge.sweep(base, experts, by, rules=rules)
    for label, method in by.items():
        alone = cfmerge.merge_params(base, experts, method, rules=rules)
        np.testing.assert_allclose(np.asarray(found[label]["w"]), np.asarray(alone["w"]), rtol=0, atol=1e-5)
