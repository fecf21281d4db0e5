"""OT fusion: a model transported onto another one, which may have other widths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import MLP, NETWORKS, mlp, model_of, spaces_of

from cfmerge.align import inverse, ot_fusion, permute, random_permutations
from cfmerge.align.transport import transport
from cfmerge.errors import CfmergeError


def wider(model, spaces, times):
    """A model that computes the same with each neuron several times, at random places, and its table of shapes."""
    generator = np.random.default_rng(0)
    sources = {name: generator.permutation(np.repeat(np.arange(size), times)) for name, size in spaces.sizes.items()}
    result = {}
    for name, tensor in model.items():
        for number, axis in enumerate(spaces.axes[name]):
            for space in axis.spaces:
                tensor = tensor.take(sources[space], axis=number) / (times if axis.reads else 1)
        result[name] = tensor
    return result, {name: (result[name].shape, text) for name, (_, text) in MLP.items()}


@pytest.mark.parametrize(
    "options", [{}, {"cost": "cosine"}, {"cost": "squared", "outgoing": "mean"}, {"biases": False}]
)
@pytest.mark.parametrize("network", ["MLP", "conv", "recurrent"])
def test_a_permuted_copy_is_transported_by_its_permutation(network, options):
    spaces, model = spaces_of(network), model_of(network)
    permutations = random_permutations(spaces, 1)
    copy = permute(spaces, model, permutations)
    fused = ot_fusion(spaces, copy, model, **options)
    for name, tensor in fused.tensors.items():
        np.testing.assert_allclose(tensor, model[name], rtol=1e-12, atol=1e-15)
    for space, back in inverse(spaces, permutations).items():
        plan = np.zeros((len(back), len(back)))
        plan[back, np.arange(len(back))] = 1 / len(back)
        np.testing.assert_allclose(fused.plans[space], plan, atol=1e-15)
        assert fused.costs[space] < 1e-6


@pytest.mark.parametrize("network", ["attention", "grouped"])
def test_heads_are_transported_as_blocks(network):
    spaces, model = spaces_of(network), model_of(network)
    permutations = {n: p for n, p in random_permutations(spaces, 1).items() if "." not in n}
    fused = ot_fusion(spaces, permute(spaces, model, permutations), model)
    for name, tensor in fused.tensors.items():
        np.testing.assert_allclose(tensor, model[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("reg", "histogram"), [(None, "uniform"), (None, "norm"), (0.02, "uniform")])
def test_a_model_that_has_each_neuron_several_times_fuses_without_loss(reg, histogram):
    spaces, model = spaces_of("MLP"), model_of("MLP")
    wide, table = wider(model, spaces, 2)
    x = np.random.default_rng(1).normal(size=(20, 6))
    np.testing.assert_allclose(mlp(wide, x), mlp(model, x))
    fused = ot_fusion(spaces, wide, model, spaces_a=spaces_of(table), reg=reg, histogram=histogram, share=0.3)
    np.testing.assert_allclose(mlp(fused.tensors, x), mlp(model, x), rtol=1e-5, atol=1e-5)
    back = ot_fusion(spaces_of(table), model, wide, spaces_a=spaces, reg=reg, histogram=histogram, share=0.0)
    np.testing.assert_allclose(mlp(back.tensors, x), mlp(model, x), rtol=1e-5, atol=1e-5)
    halved = ot_fusion(spaces, wide, model, spaces_a=spaces_of(table), outgoing="mean", share=0.0)
    assert not np.allclose(mlp(halved.tensors, x), mlp(model, x), rtol=0.1)


def test_a_share_moves_from_one_model_to_the_other():
    spaces, a, b = spaces_of("MLP"), model_of("MLP", 1), model_of("MLP", 2, np.float32)
    none, some, all_ = (ot_fusion(spaces, a, b, share=share).tensors for share in (0.0, 0.25, 1.0))
    x = np.random.default_rng(1).normal(size=(20, 6))
    np.testing.assert_allclose(mlp(none, x), mlp(a, x), rtol=1e-4, atol=1e-5)  # an assignment: a's neurons in b's order
    for name, tensor in b.items():
        assert some[name].dtype == np.float32
        np.testing.assert_array_equal(all_[name], tensor)
        np.testing.assert_allclose(some[name], 0.75 * none[name] + 0.25 * tensor, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 6), (4, 6), (5, 7)])
def test_exact_plans_are_those_of_the_linear_program_and_sinkhorn_comes_near(shape, monkeypatch):
    generator = np.random.default_rng(0)
    cost = generator.uniform(size=shape)
    alpha, beta = (np.full(n, 1 / n) for n in shape)
    plan = transport(cost, alpha, beta)
    monkeypatch.setattr("cfmerge.align.transport.LARGEST", 0)
    program = transport(cost, alpha, beta)
    assert (plan * cost).sum() == pytest.approx((program * cost).sum())
    soft = transport(cost, alpha, beta, reg=0.01)
    assert (plan * cost).sum() <= (soft * cost).sum() + 1e-4
    assert (soft * cost).sum() == pytest.approx((plan * cost).sum(), abs=0.03)
    skewed = generator.uniform(0.5, 1, size=shape[0])
    other = transport(cost, skewed / skewed.sum(), beta)
    for found, own in ((plan, alpha), (program, alpha), (soft, alpha), (other, skewed / skewed.sum())):
        np.testing.assert_allclose(found.sum(1), own, atol=1e-4)
        np.testing.assert_allclose(found.sum(0), beta, atol=1e-6)


def test_sinkhorn_that_does_not_converge_says_so(monkeypatch):
    monkeypatch.setattr("cfmerge.align.transport.CLOSE", 0.0)
    with pytest.raises(
        CfmergeError, match=r"reg 0\.0003 has not converged after 20000 rounds.* mean 0\.5: take a larger"
    ):
        transport(np.eye(2), np.full(2, 0.5), np.array([0.4, 0.6]), reg=0.0003)


def test_running_statistics_are_refused():
    table = {**NETWORKS["conv"], "bn.running_mean": ((8,), "c"), "bn.running_var": ((8,), "c")}
    with pytest.raises(CfmergeError, match=r"bn\.running_mean and 1 more: running statistics of BatchNorm are wrong"):
        ot_fusion(spaces_of(table), model_of(table), model_of(table))
    table = {**NETWORKS["conv"], "moving": ((8,), "c")}
    with pytest.raises(CfmergeError, match=r"moving: running statistics"):
        ot_fusion(spaces_of(table), model_of(table), model_of(table), statistics=["moving"])


def test_models_that_do_not_fit_are_refused():
    spaces, model = spaces_of("MLP"), model_of("MLP")
    wide, _ = wider(model, spaces, 2)
    with pytest.raises(CfmergeError, match=r"'fc0\.\w+': model a has the shape .*24.*, model b .*12.*`spaces_a=parse_"):
        ot_fusion(spaces, wide, model)
    with pytest.raises(CfmergeError, match=r"'fc2\.bias' of model a: has a NaN"):
        ot_fusion(spaces, {**model, "fc2.bias": np.full(11, np.nan)}, model)
    with pytest.raises(CfmergeError, match=r"cost 'cosin' is not known; there is: euclidean, squared, cosine"):
        ot_fusion(spaces, model, model, cost="cosin")
    unread = spaces_of({name: (shape, text.replace("12", "x")) for name, (shape, text) in {
        "up": ((3, 2), "in h, in -"), "down": ((2, 3), "-, in h")}.items()})  # fmt: skip
    with pytest.raises(CfmergeError, match=r"no tensor writes space 'h'.*mark the axes that tensors read with `in`"):
        ot_fusion(
            unread, {"up": np.ones((3, 2)), "down": np.ones((2, 3))}, {"up": np.ones((3, 2)), "down": np.ones((2, 3))}
        )
    heads = {"v": ((8, 3), "heads heads.v, in -"), "o": ((3, 8), "-, in heads heads.v")}
    many, few = ({**heads, "s": ((n,), "heads")} for n in (4, 2))
    with pytest.raises(CfmergeError, match=r"heads\.v has 4 elements in model a and 2 in b; only spaces may differ"):
        ot_fusion(spaces_of(many), model_of(few), model_of(many), spaces_a=spaces_of(few))


def test_arrays_of_jax_are_fused_by_jax():
    spaces, a, b = spaces_of("grouped"), model_of("grouped", 1, np.float32), model_of("grouped", 2, np.float32)
    fused = ot_fusion(spaces, a, b).tensors
    there = ot_fusion(
        spaces, *({name: jnp.asarray(tensor) for name, tensor in model.items()} for model in (a, b))
    ).tensors
    for name, tensor in fused.items():
        assert isinstance(there[name], jax.Array)
        assert there[name].dtype == jnp.float32
        np.testing.assert_allclose(there[name], tensor, rtol=1e-6)


@pytest.mark.parametrize("share", [-0.1, 1.5, np.nan])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(CfmergeError, match=r"ot_fusion: share: expected a number from 0 to 1, found"):
        ot_fusion(spaces_of("MLP"), model_of("MLP"), model_of("MLP", 1), share=share)


@pytest.mark.parametrize("reg", [0, -1.0, np.nan])
def test_an_entropy_that_is_none_is_refused(reg):
    with pytest.raises(CfmergeError, match=r"reg: expected a number above 0, or None, which is exact; found"):
        ot_fusion(spaces_of("MLP"), model_of("MLP"), model_of("MLP", 1), reg=reg)
