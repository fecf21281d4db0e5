"""The rule of `method: auto`, and the jobs that it settles."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import cfmerge
from cfmerge import methods
from cfmerge.cli import app
from cfmerge.core.part import Seen
from cfmerge.diagnosis import choice
from cfmerge.diagnosis.ranks import numerical_rank, rank_of, rounding
from cfmerge.errors import CfmergeError
from cfmerge.models import Kind

M, N, RANK = 48, 40, 3


def full(seed, size=0.01):
    return size * np.random.default_rng(seed).normal(size=(M, N)).astype(np.float32)


def low(seed, size=0.01, start=None):
    random = np.random.default_rng(seed)
    right = random.normal(size=(RANK, N)) if start is None else start
    return (size * random.normal(size=(M, RANK)) @ right).astype(np.float32)


BASE = np.random.default_rng(99).normal(size=(M, N)).astype(np.float32)


def rank(delta, dtype=np.float32):
    base = BASE.astype(dtype).astype(np.float32)
    expert = (base + delta).astype(dtype).astype(np.float32)
    return int(numerical_rank(jnp.asarray(expert - base), rounding(jnp.asarray(expert))))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_merged_adapter_has_its_rank_however_it_was_rounded(dtype):
    assert rank(low(0, 0.1), dtype) == RANK


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", [0.1, 1e-3])
def test_a_delta_of_full_fine_tuning_has_a_rank_that_is_not_low(dtype, size):
    assert rank(full(0, size), dtype) > choice.LOW * N


def test_rounding_that_hides_the_spectrum_is_not_taken_for_no_change():
    few = np.where(np.random.default_rng(0).uniform(size=(M, N)) < 0.1, 2.0**-8, 0).astype(np.float32) * np.abs(BASE)
    assert rank(few, ml_dtypes.bfloat16) > choice.LOW * N


def test_a_file_that_was_widened_counts_as_it_was_rounded():
    narrow = jnp.asarray(BASE).astype(jnp.bfloat16).astype(jnp.float32)
    assert float(rounding(narrow)) > 100 * float(rounding(jnp.asarray(BASE)))


def test_the_rank_of_nothing_is_0():
    assert int(rank_of(jnp.zeros(3), 1.0)) == 0


def seen(deltas):
    return Seen(jnp.asarray(BASE), jnp.stack([jnp.asarray(delta) for delta in deltas]), jnp.ones(len(deltas)))


def test_growth_is_that_of_aces_merge():
    deltas = [full(0), full(1)]
    merged = cfmerge.merge_tensor(BASE, [BASE + delta for delta in deltas], "ace") - BASE
    unrelated = np.sqrt(sum(np.sum(delta**2) for delta in deltas))
    np.testing.assert_allclose(choice.growth(seen(deltas)), np.linalg.norm(merged) / unrelated, rtol=1e-3)


def almost_one_row(count):
    """Deltas of full rank nearly all of whose energy lies along one row, almost the same in all."""
    row = np.random.default_rng(0).normal(size=(1, N))
    made = []
    for seed in range(1, count + 1):
        random = np.random.default_rng(seed)
        along = random.normal(size=(M, 1)) @ (row + 0.1 * random.normal(size=(1, N)))
        made.append((0.01 * (along + 0.03 * random.normal(size=(M, N)))).astype(np.float32))
    return made


@pytest.mark.parametrize(
    ("kind", "sides", "ranks", "grown", "weights", "branch"),
    [
        (Kind.CONVOLUTION, (64, 64), [64, 64], 1.0, (), choice.CONVOLUTION),
        (Kind.CONVOLUTION, (64, 64), [4, 4], 3.0, (), choice.CONVOLUTION),
        (Kind.MATRIX, (64, 64), [16, 0], 3.0, (1.0, 1.0), choice.LOW_RANK),
        (Kind.MATRIX, (64, 64), [16, 2], 3.0, (1.0, 2.0), choice.LOW_RANK_WEIGHTED),
        (Kind.MATRIX, (64, 64), [17, 2], 2.1, (), choice.GROWING),
        (Kind.MATRIX, (64, 64), [64, 64], 2.0, (1.0, 2.0), choice.FULL),
        (Kind.MATRIX, (64, 64), [0, 0], 0.0, (), choice.UNCHANGED),
    ],
)
def test_the_rule(kind, sides, ranks, grown, weights, branch):
    assert choice.chosen(kind, sides, ranks, grown, weights) == branch


def test_every_branch_names_a_method_that_takes_the_weights_that_it_is_chosen_for():
    for branch in choice.BRANCHES:
        method = methods.make(branch.method)
        assert method.needs.weights != "none" or branch is choice.LOW_RANK


# --- merges ---------------------------------------------------------------------------------------------------------

CONV = np.random.default_rng(98).normal(size=(8, 4, 3, 3)).astype(np.float32)


def models(experts=2):
    base = {"a.weight": BASE, "b.weight": BASE[::-1].copy(), "c.conv.weight": CONV, "d.bias": np.zeros(M, np.float32),
            "e.weight": np.zeros((0, 8), np.float32)}  # fmt: skip
    conv = [CONV + 0.01 * np.random.default_rng(t).normal(size=CONV.shape).astype(np.float32) for t in range(experts)]
    return base, [
        {
            "a.weight": base["a.weight"] + full(t),
            "b.weight": base["b.weight"] + low(t),
            "c.conv.weight": conv[t],
            "d.bias": base["d.bias"] + t,
            "e.weight": base["e.weight"],
        }
        for t in range(experts)
    ]


EXPECTED = {"a.weight": choice.FULL, "b.weight": choice.LOW_RANK, "c.conv.weight": choice.CONVOLUTION}


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, experts = models()
    for name, model in {"base": base, "one": experts[0], "two": experts[1]}.items():
        (tmp_path / name).mkdir()
        save_file(model, tmp_path / name / "model.safetensors")
    return tmp_path


def test_each_tensor_gets_the_method_of_its_branch_and_the_notes_say_why(on_disk):
    result = cfmerge.merge("base", ["one", "two"], "auto", output="merged")
    merged = cfmerge.open("merged")
    base, experts = models()
    for name, branch in EXPECTED.items():
        alone = cfmerge.merge_params({name: base[name]}, [{name: e[name]} for e in experts], branch.method)
        np.testing.assert_allclose(merged[name], alone[name], atol=1e-6)
        assert any(branch.why in note and name in note for note in result.notes), result.notes
    assert "auto" not in {name for _, name in result.plan.counts()}
    np.testing.assert_allclose(merged["d.bias"], 0.5)
    card = (on_disk / "merged" / "README.md").read_text()
    assert f"opcm for b.weight: deltas of low rank (up to {RANK})" in card


def test_a_merge_is_repeated_from_its_card(on_disk):
    cfmerge.merge("base", ["one", "two"], "auto", output="merged")
    assert CliRunner().invoke(app, ["merge", "merged/README.md", "-o", "again"]).exit_code == 0
    for name, array in cfmerge.open("merged").items():
        np.testing.assert_array_equal(array, cfmerge.open("again")[name])


def test_trees_in_memory_are_merged_as_files_are(on_disk):
    cfmerge.merge("base", ["one", "two"], "auto", output="merged")
    base, experts = models()
    with pytest.warns(UserWarning, match="auto: opcm for"):
        merged = cfmerge.merge_params(base, experts, "auto")
    for name, array in cfmerge.open("merged").items():
        np.testing.assert_allclose(merged[name], array, atol=1e-6)


def test_growth_leads_to_dc_merge():
    deltas = almost_one_row(3)
    assert float(choice.growth(seen(deltas))) > choice.GROWN
    with pytest.warns(UserWarning, match=r"auto: dc_merge for tensor: .*\(\d+\.\d\d times\)"):
        cfmerge.merge_tensor(BASE, [BASE + delta for delta in deltas], "auto")


def test_a_rule_takes_tensors_out_of_the_choice(on_disk):
    rules = [{"match": "b.*", "method": "average"}]
    result = cfmerge.merge("base", ["one", "two"], "auto", rules=rules, output="merged")
    assert result.plan.counts()["matrix", "average"] == 2  # b, and e without entries
    assert not any("opcm" in note for note in result.notes)


def test_auto_may_be_the_method_of_a_rule_alone(on_disk):
    rules = [{"match": "b.*", "method": "auto"}]
    result = cfmerge.merge("base", ["one", "two"], "average", rules=rules, output="merged")
    assert result.plan.counts()["matrix", "opcm"] == 1


def test_the_plan_says_which_method_each_tensor_gets(on_disk):
    asked = ["plan", "--base", "base", "-e", "one", "-e", "two", "-m", "auto", "--no-calibration"]
    told = " ".join(CliRunner().invoke(app, asked).output.split())
    assert "deltas of low rank" in told
    assert "half_flatten" in told


def test_auto_stands_alone():
    with pytest.raises(CfmergeError, match="chain: auto chooses whole chains"):
        methods.make("auto >> scale(0.5)")
    base, experts = models()
    with pytest.raises(CfmergeError, match="sweep: auto chooses a method for each tensor"):
        cfmerge.sweep(base, experts, {"a": methods.auto(), "b": methods.average()})
    with pytest.raises(CfmergeError, match="auto"):
        cfmerge.accumulate(base, experts, "auto")
    with pytest.raises(CfmergeError, match="under jit; call it outside"):
        jax.jit(lambda base, experts: cfmerge.merge_params(base, experts, "auto"))(base, experts)
