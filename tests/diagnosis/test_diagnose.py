"""`cfmerge.diagnose` on files: every format and form of expert is seen as a merge sees it."""

import functools
import json

import ml_dtypes
import numpy as np
import pytest

import cfmerge
from cfmerge.engine import cutting

Q, DOWN, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def small(tmp_path_factory, make_model, llama):
    """A directory with a base and three experts, m0 to m3, all of whose matrices have one shape; and the tensors."""
    folder, tensors = tmp_path_factory.mktemp("small"), []
    for number in range(4):
        own = {name: tensor for name, tensor in llama(number).items() if "mlp" not in name}
        tensors.append(own)
        make_model(folder / f"m{number}", own)
    return folder, tensors


def test_all_tensors_in_the_base_s_order_with_their_kinds_and_layers(small):
    folder, tensors = small
    found = cfmerge.diagnose(folder / "m0", [folder / f"m{number}" for number in (1, 2, 3)])
    assert found.experts == ("m1", "m2", "m3")
    assert list(found.tensors) == list(cfmerge.open_checkpoint(folder / "m0").tensors)
    for name, one in found.tensors.items():
        deltas = [own[name].astype(np.float64) - tensors[0][name] for own in tensors[1:]]
        gram = [[np.sum(a * b) for b in deltas] for a in deltas]
        np.testing.assert_allclose(one.gram, gram, rtol=1e-3, atol=1e-6)
        assert one.shape == deltas[0].shape
        assert one.is_matrix == ("proj" in name)
    second = found.tensors[Q.replace("0", "1")]
    assert (second.kind, second.layer, second.sides) == ("matrix", 1, (8, 8))
    assert (found.tensors[EMBEDDING].kind, found.tensors[EMBEDDING].layer) == ("embedding", None)
    assert found.findings == ()
    assert found.recommendation.method


def test_weights_are_kept_and_count_in_the_growth(small):
    folder, _ = small
    paths = [str(folder / f"m{number}") for number in (1, 2)]
    alike, weighted = (
        cfmerge.diagnose(folder / "m0", [cfmerge.Expert(paths[0], weight=weight), paths[1]]) for weight in (1, 4)
    )
    assert (alike.weights, weighted.weights) == ((1.0, 1.0), (4.0, 1.0))
    assert alike.tensors[Q].growth != pytest.approx(weighted.tensors[Q].growth, rel=1e-3)
    np.testing.assert_allclose(alike.tensors[Q].gram, weighted.tensors[Q].gram, rtol=1e-6)


@pytest.mark.parametrize("call", [cfmerge.diagnose, cfmerge.plan, functools.partial(cfmerge.merge, output="out")])
def test_arrays_where_paths_are_expected_are_an_error(call):
    tree = {"weight": np.ones((2, 2), np.float32)}
    with pytest.raises(cfmerge.CfmergeError, match=r"base: a path or a name is expected, found dict; .*merge_params"):
        call(tree, [tree, tree])
    with pytest.raises(cfmerge.CfmergeError, match="expert: a path or a name is expected, found dict"):
        call("base", [tree, tree])


def test_an_empty_tensor_is_not_told_as_too_large(tmp_path, make_model, llama):
    for number in range(3):
        make_model(tmp_path / f"m{number}", llama(number) | {"spare.weight": np.zeros((0, 8), np.float32)})
    found = cfmerge.diagnose(tmp_path / "m0", [tmp_path / "m1", tmp_path / "m2"])
    assert not any("not decomposed" in note for note in found.notes)


def test_json_is_plain_and_whole(family):
    found = cfmerge.diagnose(family.base, family.experts, largest=0)
    told = json.loads(json.dumps(found.to_json()))
    assert set(told) == {"base", "experts", "tensors", "findings", "recommendation", "notes", "weights"}
    assert told["tensors"][Q]["norms"] == pytest.approx(found.tensors[Q].norms.tolist())
    assert told["tensors"][Q]["ranks"] is None
    assert any("no matrix was decomposed" in note for note in told["notes"])


def test_a_recipe_s_method_does_not_matter_and_its_layouts_do(family):
    rules = [
        cfmerge.Rule(match=EMBEDDING, layout="io", kind="matrix"), cfmerge.Rule(match="*norm*", method="keep-base"),
        cfmerge.Rule(match=Q, method="ties"),
    ]  # fmt: skip
    recipe = cfmerge.Recipe(str(family.base), list(map(str, family.experts)), "regmean", rules=rules)
    found = cfmerge.diagnose(recipe, largest=0)
    assert found.tensors[EMBEDDING].kind == "matrix"
    assert not any("norm" in name for name in found.tensors)
    assert Q in found.tensors


def test_bfloat16_experts_and_one_that_is_the_base_are_findings_not_errors(tmp_path, make_model, llama):
    base = make_model(tmp_path / "base", llama(0, ml_dtypes.bfloat16))
    copy = make_model(tmp_path / "copy", llama(0, ml_dtypes.bfloat16))
    tuned = make_model(tmp_path / "tuned", llama(1, ml_dtypes.bfloat16))
    found = cfmerge.diagnose(base, [copy, tuned, base], largest=0)
    kinds = [one.kind for one in found.findings]
    assert kinds[:2] == ["equals-base", "equals-base"]
    assert found.tensors[Q].norms[0] == 0 < found.tensors[Q].norms[1]
    assert found.recommendation.method == ""


def test_large_tensors_come_in_pieces_and_are_summed(family, monkeypatch):
    whole = cfmerge.diagnose(family.base, family.experts, largest=0)
    monkeypatch.setattr(cutting, "ENTRIES", 32)
    monkeypatch.setattr(cutting, "ROW", 16)
    monkeypatch.setattr(cutting, "BYTES", 1)
    pieces = cfmerge.diagnose(family.base, family.experts, largest=0)
    for name, one in whole.tensors.items():
        np.testing.assert_allclose(pieces.tensors[name].gram, one.gram, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(pieces.tensors[name].conflicts, one.conflicts)
        assert pieces.tensors[name].base_norm == pytest.approx(one.base_norm)


def test_each_stacked_layer_is_told_by_itself(tmp_path):
    def tensors(seed):
        rng = np.random.default_rng(seed)
        shapes = {"params/layers/up/kernel": (3, 8, 8), "params/layers/norm/scale": (3, 8)}
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    base, deltas = tensors(0), [tensors(1), tensors(2)]
    cfmerge.save(base, tmp_path / "base.npz")
    for t, delta in enumerate(deltas):
        cfmerge.save({name: base[name] + 0.1 * delta[name] for name in base}, tmp_path / f"e{t}.npz")
    found = cfmerge.diagnose(tmp_path / "base.npz", [tmp_path / "e0.npz", tmp_path / "e1.npz"])
    kernel = "params/layers/up/kernel"
    assert list(found.tensors) == [*(f"{kernel}[{n}]" for n in range(3)), "params/layers/norm/scale"]
    for n in range(3):
        one = found.tensors[f"{kernel}[{n}]"]
        np.testing.assert_allclose(one.norms, [0.1 * np.linalg.norm(d[kernel][n]) for d in deltas], rtol=1e-4)
        assert (one.layer, one.shape, one.sides) == (n, (8, 8), (8, 8))


def adapter(path, seed, rank=2):
    """An adapter of both layers' queries, and `{tensor: its delta}`."""
    rng, path = np.random.default_rng(seed), path / f"adapter{seed}"
    path.mkdir()
    factors, deltas = {}, {}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"):
        a, b = rng.standard_normal((rank, 8)), rng.standard_normal((8, rank))
        factors[f"base_model.model.{name}.lora_A.weight"] = a.astype(np.float32)
        factors[f"base_model.model.{name}.lora_B.weight"] = b.astype(np.float32)
        deltas[f"{name}.weight"] = 2 * b @ a
    cfmerge.save(factors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path, deltas


def test_adapters_are_measured_by_their_deltas(tmp_path, small):
    (first, one), (second, two) = adapter(tmp_path, 1), adapter(tmp_path, 2)
    found = cfmerge.diagnose(small[0] / "m0", [first, second])
    assert list(found.tensors) == list(cfmerge.open_checkpoint(small[0] / "m0").tensors)
    for name in one:
        wanted = [[np.sum(a[name] * b[name]) for b in (one, two)] for a in (one, two)]
        np.testing.assert_allclose(found.tensors[name].gram, wanted, rtol=1e-3, atol=1e-4)
        assert found.tensors[name].ranks.tolist() == [2, 2]
    told = {finding.kind: finding for finding in found.findings}
    assert set(told["unchanged"].tensors) == set(found.tensors) - set(one)
    assert told["low-rank"].number == 2


def test_an_adapter_beside_a_model_is_missing_elsewhere(tmp_path, family):
    found = cfmerge.diagnose(family.base, [adapter(tmp_path, 1)[0], family.experts[0]], largest=0)
    assert found.tensors[DOWN].norms[0] == 0 < found.tensors[DOWN].norms[1]
    assert any(one.kind == "partly-changed" for one in found.findings)


def test_nan_is_the_error_that_a_merge_gives(tmp_path, family, make_model):
    broken = {name: tensor.copy() for name, tensor in family.tensors[1].items()}
    broken[Q][0, 0] = np.nan
    path = make_model(tmp_path / "broken", broken)
    with pytest.raises(cfmerge.CfmergeError, match=r"'broken'.*q_proj.*NaN"):
        cfmerge.diagnose(family.base, [path, *family.experts], largest=0)
    found = cfmerge.diagnose(family.base, [path, *family.experts], largest=0, on_nonfinite="skip-expert")
    assert found.experts == ("m1", "m2", "m3")
    assert f"expert 'broken' was left out: tensor {Q!r} is not finite" in found.notes
    how = {"output": tmp_path / "out", "on_nonfinite": "skip-expert"}
    with pytest.raises(cfmerge.CfmergeError, match=r"and 1 expert is left to merge: repair it, or give more$"):
        cfmerge.merge(family.base, [path, family.experts[0]], "average", **how)


def test_changes_whose_squares_do_not_fit_float32(tmp_path, small, make_model):
    """Too small for sums of squares they are changes yet; too large they are an error."""
    for factor in (1e-30, 1e30):
        for number, tensors in enumerate(small[1][:3]):
            scaled = {name: factor * tensor for name, tensor in tensors.items()}
            make_model(tmp_path / f"{factor:g}" / f"m{number}", scaled)
    base, *experts = (tmp_path / "1e-30" / f"m{number}" for number in range(3))
    found = cfmerge.diagnose(base, experts)
    assert all((one.norms > 0).all() for one in found.tensors.values())
    assert (found.tensors[Q].ranks == 8).all()
    assert "equals-base" not in [one.kind for one in found.findings]
    base, *experts = (tmp_path / "1e+30" / f"m{number}" for number in range(3))
    with pytest.raises(cfmerge.CfmergeError, match=r"tensor '.*': sums of squares .* do not fit float32"):
        cfmerge.diagnose(base, experts, largest=0)


def test_progress_tells_every_byte(family):
    told = []
    cfmerge.diagnose(family.base, family.experts, largest=0, progress=lambda name, count: told.append((name, count)))
    size = sum(tensor.nbytes for tensor in family.tensors[0].values())
    assert sum(count for _, count in told) == 4 * size


def test_statistics_cannot_be_diagnosed(family):
    with pytest.raises(cfmerge.CfmergeError, match="needs the experts themselves"):
        cfmerge.diagnose(family.base, family.experts, statistics="sums")
