"""Bad models: the message names what, where and the way out, and nothing is left on disk.

`refused` (conftest) runs the merge, looks for the words, and compares everything on disk before and after.
"""

import shutil

import ml_dtypes
import numpy as np
import pytest
from bad_models import EMBED, UP, Q, rewrite, spoil

import cfmerge
from cfmerge import Expert, Rule
from cfmerge.formats.shards import save
from cfmerge.recipe import load, parse

# --- the expert is not of the base -------------------------------------------------------------------------------


def test_another_architecture(family, refused, make_model, tmp_path, llama, llama_config, load):
    """It is told where tensors do not fit; where all match, it is a note."""
    mistral = llama_config | {"model_type": "mistral"}
    other = make_model(tmp_path / "other", {**llama(1), Q: np.ones((4, 8), np.float32)}, mistral)
    refused(["'other'", str(other), "'mistral'", "'llama'", "architecture"], family.base, [family.experts[0], other])
    same = make_model(tmp_path / "same", llama(1), mistral)
    result = cfmerge.merge(family.base, [same, family.experts[1]], "average", output=tmp_path / "out")
    assert any("'mistral'" in note and "architecture" in note for note in result.notes)
    np.testing.assert_allclose(load(tmp_path / "out")[Q], (llama(1)[Q] + llama(2)[Q]) / 2, atol=1e-6)


def test_a_name_that_is_not_utf_8(family, refused):
    """The recipe and the card could not hold it."""
    other = family.experts[1].with_name("m\udcff")
    try:
        family.experts[1].rename(other)
    except OSError:
        pytest.skip("the file system takes no such name")
    refused(["m\\udcff", "is not UTF-8", "rename it"], family.base, [family.experts[0], other])


def test_missing_tensor(family, refused):
    rewrite(family.experts[1], lambda tensors: tensors.pop(Q))
    refused(["'m2'", str(family.experts[1]), repr(Q), "(8, 8)", "keep-base"], family.base, family.experts)


def test_extra_tensor(family, refused):
    rewrite(family.experts[2], lambda tensors: tensors.update({"model.new.weight": np.ones((3, 2), np.float32)}))
    refused(["'m3'", "'model.new.weight'", "(3, 2)", "base lacks"], family.base, family.experts)


def test_renamed_tensor(family, refused):
    """The nearest name is suggested, both ways."""
    rewrite(family.experts[0], lambda tensors: tensors.update({UP.replace("up_proj", "up_prj"): tensors.pop(UP)}))
    message = refused([], family.base, family.experts)
    lacks, has = message.split("\n")
    assert "'m1'" in lacks
    assert "lacks tensor " + repr(UP) in lacks
    assert "did you mean 'model.layers.1.mlp.up_prj.weight'" in lacks
    assert "'model.layers.1.mlp.up_prj.weight'" in has
    assert f"did you mean {UP!r}" in has


def test_all_problems_at_once(family, refused):
    """Header problems of all experts come in one message, before a tensor is read."""
    rewrite(family.experts[0], lambda tensors: tensors.pop(Q))
    rewrite(family.experts[1], lambda tensors: tensors.update({UP: np.ones((8, 8), np.float32)}))
    spoil(family.experts[2], Q, np.nan)
    message = refused(["'m1'", repr(Q), "'m2'", repr(UP)], family.base, family.experts)
    assert "NaN" not in message


def test_many_problems_are_cut(family, refused, make_model, tmp_path):
    nothing = make_model(tmp_path / "nothing", {"lm_head.weight": np.ones((12, 8), np.float32)})
    message = refused(["lacks 10 tensors", "model.*"], family.base, [nothing, family.experts[0]])
    assert len(message.split("\n")) <= 6


def test_experts_with_the_same_problem_are_told_together(family, refused):
    for expert in family.experts:
        rewrite(expert, lambda tensors: tensors.pop(Q))
    message = refused(["experts 'm1'", str(family.experts[1]), "'m3'", ": each lacks tensor " + repr(Q)], family.base,
                      family.experts)  # fmt: skip
    assert message.count("--rule") == 1


def test_a_rule_that_is_given_twice_counts_once(family, tmp_path):
    rules = [{"match": Q, "method": "keep-base"}] * 2
    assert len(cfmerge.plan(family.base, family.experts, "average", rules=rules).jobs) > 1


def test_a_model_of_another_size_is_told_by_patterns(family, refused, make_model, tmp_path, llama):
    large = {name: np.ones(tuple(2 * n for n in tensor.shape), np.float32) for name, tensor in llama().items()}
    message = refused(
        ["2 tensors of another shape: model.layers.{0..1}.self_attn.q_proj.weight", "more tensors of another shape",
         "fine-tuned copy",
         '--rule "match=model.layers.*.self_attn.q_proj.weight, method=keep-base"'],
        family.base, [make_model(tmp_path / "large", large), family.experts[0]],
    )  # fmt: skip
    assert len(message.split("\n")) <= 7


def test_a_model_with_fewer_layers(family, refused, tmp_path):
    """A rule for each layer takes all that is missing."""

    def without_last(tensors):
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    rewrite(family.experts[0], without_last)
    refused(["lacks", "tensors of the base: model.layers.1.*", "partial: true"], family.base, family.experts)
    rules = [{"match": "model.layers.1.*", "method": "keep-base"}]
    assert cfmerge.plan(family.base, family.experts, "average", rules=rules).jobs


def test_shape_mismatch(family, refused):
    """mergekit leaves such a tensor at the base, with a warning."""
    rewrite(family.experts[1], lambda tensors: tensors.update({UP: np.ones((24, 8), np.float32)}))
    words = ["'m2'", str(family.experts[1] / "model.safetensors"), repr(UP), "(24, 8)", "(16, 8)", "keep-base"]
    refused(words, family.base, family.experts)


def test_transposed_tensor(family, refused):
    rewrite(family.experts[1], lambda tensors: tensors.update({UP: np.ascontiguousarray(tensors[UP].T)}))
    refused(["'m2'", repr(UP), "(8, 16)", "(16, 8)"], family.base, family.experts)


@pytest.mark.parametrize("dtype", [np.int8, np.bool_, np.int64])
def test_integers_for_floats(family, refused, dtype):
    rewrite(family.experts[1], lambda tensors: tensors.update({Q: tensors[Q].astype(dtype)}))
    refused(["'m2'", repr(Q), np.dtype(dtype).name, "float32", "dequantised"], family.base, family.experts)


def test_floats_for_integers(refused, make_model, tmp_path, llama):
    def model(name, number, dtype):
        return make_model(tmp_path / name, llama(number) | {"model.buckets": np.arange(4, dtype=dtype)})

    base, one, two = model("a", 0, np.int64), model("b", 1, np.int64), model("c", 2, np.float32)
    refused(["'c'", "'model.buckets'", "float32", "int64"], base, [one, two])


def test_quantised_base(family, refused, make_model, tmp_path, llama):
    tensors = llama() | {Q: llama()[Q].astype(ml_dtypes.float8_e4m3fn)}
    base = tmp_path / "base"
    base.mkdir()
    save(base, tensors, {}, "model")
    refused([str(base), repr(Q), "float8_e4m3fn", "bfloat16"], base, family.experts)


def test_vocabulary_sizes(family, refused):
    rewrite(family.experts[0], lambda tensors: tensors.update({EMBED: np.ones((13, 8), np.float32)}))
    words = ["'m1'", repr(EMBED), "vocabulary", "13 rows", "12 in the base", "resize_token_embeddings", "keep-base"]
    refused(words, family.base, family.experts)


def test_vocabulary_sizes_the_named_way_out(family, tmp_path, load):
    rewrite(family.experts[0], lambda tensors: tensors.update({EMBED: np.ones((13, 8), np.float32)}))
    rules = [Rule(EMBED, "keep-base")]
    result = cfmerge.merge(family.base, family.experts, "average", rules=rules, output=tmp_path / "out")
    assert np.array_equal(load(result.output)[EMBED], family.tensors[0][EMBED])


# --- NaN, infinity, overflow -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [Q, EMBED, "model.norm.weight"])
def test_not_finite_in_an_expert(family, refused, name, value):
    spoil(family.experts[1], name, value, at=-1)
    words = ["expert 'm2'", str(family.experts[1]), repr(name), "NaN or infinity", "skip-expert"]
    refused(words, family.base, family.experts)


def test_not_finite_in_an_expert_with_ace(family, refused):
    spoil(family.experts[2], UP, np.nan)
    refused(["expert 'm3'", repr(UP), "NaN or infinity"], family.base, family.experts, "ace")


@pytest.mark.parametrize("choice", ["error", "skip-expert"])
def test_not_finite_in_the_base(family, refused, choice):
    spoil(family.base, Q, np.nan)
    message = refused([f"base ({family.base})", repr(Q)], family.base, family.experts, on_nonfinite=choice)
    assert "skip-expert" not in message


def test_not_finite_in_a_kept_tensor(family, refused):
    spoil(family.base, EMBED, np.inf)
    rules = [Rule(EMBED, "keep-base")]
    refused([f"base ({family.base})", repr(EMBED), "NaN"], family.base, family.experts, rules=rules)


def test_not_finite_in_an_exported_head(refused, make_model, tmp_path, llama):
    def model(name, number, value):
        return make_model(tmp_path / name, llama(number) | {"score.weight": np.full((2, 8), value, np.float32)})

    base = make_model(tmp_path / "base")
    refused(["'b'", "'score.weight'", "NaN"], base, [model("a", 1, 1), model("b", 2, np.nan)], heads="export")


def test_skip_expert(family, tmp_path, load):
    """The same as without it, and the notes, the card and its recipe say so."""
    spoil(family.experts[1], Q, np.nan)
    kept = [family.experts[0], family.experts[2]]
    skipped = cfmerge.merge(
        family.base, family.experts, "average", on_nonfinite="skip-expert", output=tmp_path / "skipped"
    )
    without = cfmerge.merge(family.base, kept, "average", output=tmp_path / "without")
    files = [result.output / "model.safetensors" for result in (skipped, without)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [spec.name for spec in skipped.plan.expert_specs] == ["m1", "m3"]
    assert any("'m2' was left out" in note and repr(Q) in note for note in skipped.notes)
    card = skipped.output / "README.md"
    assert "'m2' was left out" in card.read_text()
    assert [expert.path for expert in load_experts(card)] == [str(path) for path in kept]


def load_experts(card):
    return load(card).resolved_experts()


def test_skip_expert_needs_experts_that_are_left(family, refused):
    for number in (0, 2):
        spoil(family.experts[number], Q, np.nan)
    refused(["'m3'", repr(Q), "1 expert is left"], family.base, family.experts, on_nonfinite="skip-expert")


@pytest.mark.parametrize("keep", [False, True])
def test_overflow_of_the_output(refused, make_model, tmp_path, llama, keep):
    """float16 holds up to 65504; a merge that does not fit is not written."""

    def model(name, number):
        tensors = llama(number)
        tensors[Q] = tensors[Q] * 1e5
        return make_model(tmp_path / name, tensors)

    models = [model(name, number) for number, name in enumerate("abc")]
    rules = [Rule(Q, "keep-base")] if keep else []
    refused([repr(Q), "float16"], models[0], models[1:], dtype="float16", rules=rules)


def test_overflow_of_the_base_dtype(refused, make_model, tmp_path, llama):
    """Experts fit, their sum does not."""

    def model(name, value):
        tensors = llama(dtype=np.float16)
        tensors[Q] = tensors[Q] + np.float16(value)
        return make_model(tmp_path / name, tensors)

    models = [model("a", 0), model("b", 40_000), model("c", 41_000)]
    words = [repr(Q), "float16", "--dtype float32"]
    refused(words, models[0], models[1:], "task_arithmetic", parameters={"scale": 1})


def test_an_expert_is_left_out_of_models_whose_names_are_renamed(make_model, llama, tmp_path):
    """The plan without it is made of the files again, not of the names that the first plan saw."""
    base = make_model(tmp_path / "base", llama())
    paths = []
    for number in (1, 2, 3):
        tensors = {name.replace("layers", "blocks"): tensor for name, tensor in llama(number).items()}
        if number == 3:
            tensors["model.norm.weight"][0] = np.nan
        paths.append(make_model(tmp_path / f"m{number}", tensors))
    options = {"rename": [{"from": "blocks", "to": "layers"}], "on_nonfinite": "skip-expert"}
    result = cfmerge.merge(base, paths, "average", output=tmp_path / "out", **options)
    assert [spec.name for spec in result.plan.expert_specs] == ["m1", "m2"]


# --- corrupt files -----------------------------------------------------------------------------------------------


def test_truncated_expert(family, refused):
    path = family.experts[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    refused([str(path), "truncated"], family.base, family.experts)


def test_pickled_expert(family, refused):
    path = family.experts[1] / "model.safetensors"
    path.write_bytes(b"PK\x03\x04" + b"\0" * 100)
    refused([str(path), "pickle", "not opened"], family.base, family.experts)


def test_missing_expert(family, refused, tmp_path):
    refused([str(tmp_path / "none"), "no such file"], family.base, [*family.experts, tmp_path / "none"])


# --- the same model twice ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["path", "link", "copy", "in shards"])
def test_base_as_expert(family, refused, make_model, tmp_path, how, llama):
    path = family.base
    if how == "link":
        path = tmp_path / "link"
        path.symlink_to(family.base)
    elif how == "copy":
        path = shutil.copytree(family.base, tmp_path / "copy")
    elif how == "in shards":
        path = make_model(tmp_path / "shards", llama(), shards=2)
    words = [repr(path.resolve().name), str(path), "base", "--allow base-as-expert"]
    refused(words, family.base, [path, family.experts[0]])


def test_base_as_expert_allowed(family, tmp_path, load):
    experts = [family.base, family.experts[0]]
    cfmerge.merge(family.base, experts, "average", output=tmp_path / "out", allow=["base-as-expert"])
    found = load(tmp_path / "out")
    for name, tensor in family.tensors[1].items():
        np.testing.assert_allclose(found[name], (family.tensors[0][name] + tensor) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("copied", [False, True])
def test_duplicate_experts(family, refused, tmp_path, copied):
    one = family.experts[0]
    two = shutil.copytree(one, tmp_path / "two") if copied else one
    refused(["'m1'", "same", str(two), "--allow duplicate-experts"], family.base, [one, two, family.experts[1]])


@pytest.mark.parametrize("copied", [False, True])
def test_duplicate_experts_count_twice(family, tmp_path, copied, load):
    """mergekit keeps one of them."""
    one, other = family.experts[:2]
    two = shutil.copytree(one, tmp_path / "two") if copied else one
    for method in ("task_arithmetic", "average"):
        twice, heavy = tmp_path / f"{method}-twice", tmp_path / f"{method}-heavy"
        result = cfmerge.merge(family.base, [one, two, other], method, output=twice, allow=["duplicate-experts"])
        cfmerge.merge(family.base, [Expert(str(one), weight=2), Expert(str(other))], method, output=heavy)
        assert any("'m1'" in note for note in result.notes)
        a, b = load(twice), load(heavy)
        for name in a:  # sums of another order: the last bit may differ
            np.testing.assert_allclose(a[name], b[name], rtol=1e-6, atol=1e-7)


def test_names_of_experts_are_made_different(family, tmp_path):
    """Two directories of one name; exported heads and notes need names that differ."""
    for number, place in enumerate(("x/checkpoint", "y/checkpoint")):
        shutil.copytree(family.experts[number], tmp_path / place)
    recipe = parse({"base": "b", "experts": [str(tmp_path / p / "checkpoint") for p in "xy"]}, "test")
    assert [expert.name for expert in recipe.resolved_experts()] == ["checkpoint", "y-checkpoint"]


def test_the_end_of_a_file_is_not_in_an_expert_s_name():
    names = {f"dir/x{end}": "x" for end in (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".npz", "")}
    for path, name in {**names, "dir/x.v2": "x.v2"}.items():
        recipe = parse({"base": "b", "experts": [path], "allow": ["one-expert"]}, "test")
        assert [expert.name for expert in recipe.resolved_experts()] == [name]


def test_two_experts_of_one_given_name(family, refused):
    experts = [Expert(str(path), name="same") for path in family.experts]
    refused(["'same'", str(family.experts[0]), str(family.experts[1])], family.base, experts)


@pytest.mark.parametrize("name", ["a/b", "..", "a\\b", "a\0b"])
def test_expert_name_that_is_no_file_name(family, refused, name):
    refused([repr(name)], family.base, [Expert(str(family.experts[0]), name), Expert(str(family.experts[1]))])


def test_one_expert(family, refused, tmp_path, load):
    one = family.experts[:1]
    refused([str(one[0]), "--allow one-expert"], family.base, one)
    cfmerge.merge(family.base, one, "average", output=tmp_path / "out", allow=["one-expert"])
    for name, tensor in load(tmp_path / "out").items():
        np.testing.assert_allclose(tensor, family.tensors[1][name], rtol=1e-6, atol=1e-7)


def test_no_experts(family, refused):
    refused(["no experts"], family.base, [])


# --- integers and ties -------------------------------------------------------------------------------------------


def with_buffers(make_model, path, tensors, ids=(0, 1, 2), batches=7):
    buffers = {
        "model.position_ids": np.array([ids]),
        "model.norm.num_batches_tracked": np.array(batches),
        "model.drop/rngs/key/value": np.array([batches, 7], np.uint32),
        "model.mask": np.array([True, False]),
    }
    return make_model(path, tensors | buffers)


def test_integers_that_agree(make_model, tmp_path, llama, load):
    """They stay integers of their dtype and shape; counters and random keys differ by nature and are the base's."""
    models = [with_buffers(make_model, tmp_path / f"m{n}", llama(n), batches=100 * n) for n in range(3)]
    cfmerge.merge(models[0], models[1:], "average", output=tmp_path / "out")
    found, expected = load(tmp_path / "out"), load(models[0])
    kept = [f"model.{name}" for name in ("position_ids", "norm.num_batches_tracked", "mask", "drop/rngs/key/value")]
    for name in kept:
        assert (found[name].dtype, found[name].shape) == (expected[name].dtype, expected[name].shape)
        assert np.array_equal(found[name], expected[name])


def test_integers_that_disagree(make_model, tmp_path, llama, refused, load):
    base = with_buffers(make_model, tmp_path / "a", llama(0))
    experts = [
        with_buffers(make_model, tmp_path / "b", llama(1)),
        with_buffers(make_model, tmp_path / "c", llama(2), ids=(0, 1, 9)),
    ]
    refused(["'c'", str(experts[1]), "'model.position_ids'", "int64", "keep-base"], base, experts)
    rules = [Rule("model.position_ids", "keep-base")]
    cfmerge.merge(base, experts, "average", rules=rules, output=tmp_path / "out")
    assert load(tmp_path / "out")["model.position_ids"].tolist() == [[0, 1, 2]]


def test_method_for_integers(make_model, tmp_path, llama, refused):
    models = [with_buffers(make_model, tmp_path / f"m{n}", llama(n)) for n in range(3)]
    rules = [Rule("model.position_ids", "average")]
    refused(["'model.position_ids'", "int64", "keep-base"], models[0], models[1:], rules=rules)


def test_integers_that_only_an_expert_has(make_model, tmp_path, llama, load):
    base = make_model(tmp_path / "a")
    experts = [make_model(tmp_path / "b", llama(1)), with_buffers(make_model, tmp_path / "c", llama(2))]
    result = cfmerge.merge(base, experts, "average", output=tmp_path / "out")
    assert any("'c'" in note and "integer" in note for note in result.notes)
    assert set(load(tmp_path / "out")) == set(llama())


def test_tied_tensors_that_differ(make_model, tmp_path, llama, llama_config, refused):
    """The config ties them, the file says otherwise: one of the two is wrong."""
    config = llama_config | {"tie_word_embeddings": True}

    def model(name, number, same):
        tensors = llama(number)
        if same:
            tensors["lm_head.weight"] = tensors[EMBED].copy()
        return make_model(tmp_path / name, tensors, config)

    good = [model(f"good{number}", number, True) for number in range(3)]
    words = ["'lm_head.weight'", repr(EMBED), "tied", "differ", "tie_word_embeddings"]
    refused(["base", *words], model("base", 0, False), good[1:])
    refused(["expert 'bad'", *words], good[0], [good[1], model("bad", 2, False)])


@pytest.mark.parametrize("twice", [False, True])
def test_expert_that_unties(make_model, tmp_path, llama, llama_config, refused, twice):
    """An expert with an output layer of its own does not lose it without a word."""
    tied = llama() | {"lm_head.weight": llama()[EMBED].copy()}
    if not twice:
        del tied["lm_head.weight"]
    base = make_model(tmp_path / "base", tied, llama_config | {"tie_word_embeddings": True})
    experts = [make_model(tmp_path / f"m{number}", llama(number)) for number in (1, 2)]
    refused(["'m1'", "'lm_head.weight'", repr(EMBED), "tie_word_embeddings"], base, experts)
