"""Merges of adapters by name: PEFT's against PEFT, KnOTS and Core Space against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spectral_parts import merged, report

import cfmerge
from cfmerge import methods
from cfmerge.errors import CfmergeError
from cfmerge.models.deltas import Factors

M, N, RANK, EXPERTS = 12, 17, 3, 3
RNG = np.random.default_rng(11)
BS = [RNG.standard_normal((M, RANK)) for _ in range(EXPERTS)]
AS = [RNG.standard_normal((RANK, N)) for _ in range(EXPERTS)]
DELTAS = [b @ a for b, a in zip(BS, AS, strict=True)]
WEIGHTS, SCALES = [1.0, 0.5, -0.7], [2.0, 0.25, 1.5]


def by_factors(text, weights=None, lefts=BS, rights=AS):
    """`(merged delta, report)` of the adapters, by their factors."""
    with jax.enable_x64(True):
        left, right, told = jax.jit(lambda *sides: methods.merge_factors(methods.make(text), *sides, weights))(
            [jnp.asarray(b) for b in lefts], [jnp.asarray(a) for a in rights]
        )
        return np.asarray(left @ right), {name: float(value) for name, value in told.items()}


# --- PEFT ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft_model():
    """A layer with the adapters, whose B's and A's have the scales apart, and a function that merges them."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")

    layer = torch.nn.Sequential(torch.nn.Linear(N, M, bias=False).double())
    names = [f"e{t}" for t in range(EXPERTS)]
    configs = [
        peft.LoraConfig(r=RANK, lora_alpha=scale * RANK, target_modules=["0"]) for scale in SCALES
    ]  # fmt: skip
    model = peft.get_peft_model(layer, configs[0], adapter_name="e0")
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    target = model.base_model.model[0].double()
    for name, b, a in zip(names, BS, AS, strict=True):
        target.lora_A[name].weight.data = torch.tensor(a)
        target.lora_B[name].weight.data = torch.tensor(b)

    def merge(rule, weights, **options):
        label = f"{rule}{len(target.lora_A)}"
        model.add_weighted_adapter(names, weights, label, combination_type=rule, **options)
        return (target.scaling[label] * target.lora_B[label].weight @ target.lora_A[label].weight).detach().numpy()

    return merge


@pytest.mark.parametrize(
    ("rule", "text", "options"),
    [("cat", "peft_cat", {}), ("linear", "peft_linear", {}), ("svd", "peft_svd", {}),
     ("svd", "peft_svd(rank=2)", {"svd_rank": 2})],
)  # fmt: skip
def test_a_rule_of_peft_gives_what_peft_gives(peft_model, rule, text, options):
    balanced = [Factors(scale * b, a, scale=scale).balanced for scale, b, a in zip(SCALES, BS, AS, strict=True)]
    found, told = by_factors(text, WEIGHTS, *zip(*balanced, strict=True))
    expected = peft_model(rule, WEIGHTS, **options)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    total = sum(w * s * delta for w, s, delta in zip(WEIGHTS, SCALES, DELTAS, strict=True))
    if rule != "cat":
        off = np.linalg.norm(found - total) / np.linalg.norm(total)
        assert off > 0.01
        assert told["off_sum"] == pytest.approx(off)
        condition, message = methods.make(text).notes["off_sum"]
        assert condition(off)
        assert f"{off:.0%} of its length off" in message.format(value=off)


def test_factors_share_their_scale():
    factors = Factors(np.full((2, 1), -4.0), np.ones((1, 3)), scale=-4.0)
    left, right = factors.balanced
    np.testing.assert_allclose(left @ right, factors.product)
    np.testing.assert_allclose(left, 2.0)


def test_linear_takes_no_dense_deltas():
    base = np.zeros((M, N))
    with pytest.raises(CfmergeError, match=r"peft_linear.*takes the factors of adapters, B and A, which expert"):
        cfmerge.merge_tensor(base, DELTAS, "peft_linear")
    with pytest.raises(CfmergeError, match="takes the adapters' factors, not what trim makes"):
        methods.make("trim >> peft_linear")


def test_linear_takes_adapters_of_one_rank():
    with pytest.raises(CfmergeError, match=r"found ranks \[2, 3\]; use peft_cat"):
        by_factors("peft_linear", None, [BS[0], BS[1][:, :2]], [AS[0], AS[1][:2]])


def test_the_svd_of_dense_deltas_needs_a_rank():
    with pytest.raises(CfmergeError, match=r"peft_svd\(rank=16\)"):
        merged(methods.peft_svd(), DELTAS)
    found = merged(methods.peft_svd(2), DELTAS)
    np.testing.assert_allclose(found, by_factors("peft_svd(rank=2)")[0], rtol=0, atol=1e-9)


# --- KnOTS --------------------------------------------------------------------------------------------------------


def test_knots_with_the_sum_is_the_sum():
    total = sum(DELTAS)
    text = "knots(method=task_arithmetic(scale=1))"
    np.testing.assert_allclose(merged(methods.make(text), DELTAS), total, rtol=0, atol=1e-9)
    np.testing.assert_allclose(by_factors(text)[0], total, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rule", ["ties(density=0.3)", "magmax"])
def test_knots_applies_a_rule_to_the_right_singular_vectors(rule):
    u, s, vt = np.linalg.svd(np.concatenate(DELTAS, axis=1), full_matrices=False)
    k = EXPERTS * RANK
    parts = list((vt[:k].reshape(k, EXPERTS, N)).swapaxes(0, 1))
    expected = u[:, :k] * s[:k] @ merged(methods.make(rule), parts)
    np.testing.assert_allclose(merged(methods.make(f"knots(method={rule}, rank={k})"), DELTAS), expected, atol=1e-8)
    found, told = by_factors(f"knots(method={rule})")  # their ranks are known
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)
    assert (told["directions"], told["unused"]) == (k, 0)


def test_knots_tells_of_directions_that_dense_deltas_do_not_have():
    method = methods.make("knots(method=ties(density=0.3))")
    told = report(method, DELTAS)
    assert told["unused"] == M - EXPERTS * RANK
    condition, message = method.notes["unused"]
    assert condition(told["unused"])
    assert "3 directions fewer" in message.format(value=told["unused"])


# --- Core Space ---------------------------------------------------------------------------------------------------


def core_space(lefts, rights, basis, rule):
    def side(factors):
        columns = np.concatenate(factors, axis=1)
        if basis == "svd":
            q = np.linalg.svd(columns, full_matrices=False)[0]
            return q, [q.T @ factor for factor in factors]
        q, r = np.linalg.qr(columns)
        return q, np.split(np.where(np.abs(r) > 1e-12, r, 0), len(factors), axis=1)

    (u, ls), (v, rs) = side(lefts), side([right.T for right in rights])
    cores = [left @ right.T for left, right in zip(ls, rs, strict=True)]
    return u @ merged(methods.make(rule), cores) @ v.T


@pytest.mark.parametrize("basis", ["svd", "qr"])
def test_core_space_applies_a_rule_to_the_cores_of_the_factors(basis):
    rule = "ties(density=0.3)"
    text = f"core_space(basis={basis!r}, method={rule})"
    expected = core_space(BS, AS, basis, rule)
    np.testing.assert_allclose(by_factors(text)[0], expected, rtol=0, atol=1e-8)
    factors = [(u[:, :RANK] * s[:RANK] ** 0.5, s[:RANK, None] ** 0.5 * vt[:RANK])
               for u, s, vt in map(np.linalg.svd, DELTAS)]  # fmt: skip
    dense = merged(methods.make(text[:-1] + f", rank={RANK})"), DELTAS)
    np.testing.assert_allclose(dense, core_space(*zip(*factors, strict=True), basis, rule), rtol=0, atol=1e-8)
    assert np.abs(dense - expected).max() > 1e-2  # a rule of entries depends on the basis


def test_core_space_by_a_method_that_commutes_is_that_method():
    for rule in ("average", "tsv_m"):
        expected = by_factors(rule)[0]
        np.testing.assert_allclose(by_factors(f"core_space(method={rule})")[0], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["knots", "core_space"])
def test_rules_that_no_basis_can_follow_are_refused(name):
    with pytest.raises(CfmergeError, match=f"{name}: regmean asks for moments of each delta"):
        methods.make(f"{name}(method=regmean)")
    with pytest.raises(CfmergeError, match=f"{name}: ties takes one number for all experts and tensors here"):
        getattr(methods, name)(method=methods.ties(density=[0.1, 0.2, 0.3]))


def test_every_parameter_is_explained():
    for name in ("knots", "core_space", "peft_cat", "peft_svd", "peft_linear"):
        entry = methods.registry()[name]
        assert entry.summary
        assert entry.source
        assert all(entry.describe(key) for key in entry.signature)
