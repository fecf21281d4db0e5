"""LoRA fine-tuning merged into float32 weights is recognised, and solved in its own form."""

import numpy as np
import pytest

import cfmerge
from cfmerge.engine.low_rank import BLOCK, rank_bound

NAME = "model.layers.0.mlp.down_proj.weight"
SHAPE = (520, 1030)


def weights(expert, rank, dtype=np.float32):
    rng = np.random.default_rng(0)
    base = 0.02 * rng.standard_normal(SHAPE, np.float32)
    if expert is None:
        return base.astype(dtype)
    rng = np.random.default_rng(expert + 1)
    if rank is None:
        return (base + 1e-3 * rng.standard_normal(SHAPE, np.float32)).astype(dtype)
    low = rng.standard_normal((SHAPE[0], rank), np.float32) @ rng.standard_normal((rank, SHAPE[1]), np.float32)
    return (base + 3e-4 * low).astype(dtype)


def test_rank_bound():
    base = weights(None, None)
    assert rank_bound(base, (weights(t, 12) for t in range(3)), 3) == 16
    assert rank_bound(base, (weights(t, None) for t in range(3)), 3) is None
    assert rank_bound(base, (weights(t, 12) for t in range(30)), 30) is None  # together too many
    assert rank_bound(base[:100], (weights(t, 12)[:100] for t in range(3)), 3) is None  # too small to pay
    broken = weights(0, 12)
    broken[0] = np.nan
    assert rank_bound(base, [broken], 1) is None


@pytest.fixture(scope="module")
def family(tmp_path_factory, make_model):
    root = tmp_path_factory.mktemp("lora")

    def model(name, tensor):
        return make_model(root / name, {NAME: tensor})

    return model("base", weights(None, None)), [model(f"e{t}", weights(t, 12)) for t in range(3)], model


def merged(base, experts, tmp_path, load, **parameters):
    result = cfmerge.merge(base, experts, output=tmp_path / "out", parameters=parameters, overwrite=True)
    return load(tmp_path / "out")[NAME] - weights(None, None), result


def test_low_rank_deltas_agree_with_the_full_form(family, tmp_path, load):
    base, experts, _ = family
    narrow, result = merged(base, experts, tmp_path, load)
    assert 0 < result.reports[NAME]["factor_error"] < 1e-4  # the form that factorises was used
    full, result = merged(base, experts, tmp_path, load, form="full")
    assert result.reports[NAME]["factor_error"] == 0
    assert np.linalg.norm(narrow - full) < 1e-3 * np.linalg.norm(full)  # float32 weights hold the delta to 1e-4


def test_one_delta_of_full_rank_sends_all_the_full_way(family, tmp_path, load):
    base, experts, model = family
    _, result = merged(base, [*experts, model("full", weights(9, None))], tmp_path, load)
    assert result.reports[NAME]["factor_error"] == 0


def test_a_bound_that_the_block_missed_is_caught(family, tmp_path, load):
    """Forty changed rows that the block does not see: the factorisation's error gives them away."""
    base, experts, model = family
    seen = np.linspace(0, SHAPE[0] - 1, BLOCK).astype(int)
    unseen = np.setdiff1d(np.arange(SHAPE[0]), seen)[:40]
    tensor = weights(9, 12)
    tensor[unseen] += 1e-3 * np.random.default_rng(4).standard_normal((40, SHAPE[1]), np.float32)
    assert rank_bound(weights(None, None), [tensor], 1) == 16
    _, result = merged(base, [*experts, model("hidden", tensor)], tmp_path, load)
    assert result.reports[NAME]["factor_error"] == 0
