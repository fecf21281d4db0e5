"""Names by tables: what a rule says, both directions, stacks, and the errors."""

import ml_dtypes
import numpy as np
import pytest

import cfmerge
from cfmerge.errors import CfmergeError
from cfmerge.models.names import FAMILIES, sizes_of, translate
from cfmerge.models.names.rules import Family, Name, rearranged, table

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
CONFIG = {"hidden_size": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3}
Q = "model.layers.0.self_attn.q_proj.weight"


def headers(**shapes):
    return {name.replace("__", "."): (shape, F32) for name, shape in shapes.items()}


def converted(tensors, family, sizes=None):
    """The tensors under the other names, as `convert` makes them of its moves."""
    made = translate({n: (t.shape, t.dtype) for n, t in tensors.items()}, FAMILIES[family], sizes or {})
    out = {name: np.zeros(shape, dtype) for name, (shape, dtype) in made.headers.items()}
    for move in made.moves:
        flat = tensors[move.source].reshape(-1)
        part = flat[move.first : None if move.entries is None else move.first + move.entries]
        moved = part.reshape(move.how.split).transpose(move.how.order).reshape(-1)
        out[move.target].reshape(-1)[move.at : move.at + moved.size] = moved
    return out


# --- names and axes ----------------------------------------------------------------------------------------------


def test_a_name_has_numbers_words_and_a_part_that_may_lack():
    name = Name("[bert.]layer.{l}.{x=key|value}.weight")
    assert name.values("bert.layer.12.key.weight") == {"_optional": "bert.", "l": "12", "x": "key"}
    assert name.values("layer.0.value.weight") == {"_optional": "", "l": "0", "x": "value"}
    assert name.name(name.values("bert.layer.12.key.weight")) == "bert.layer.12.key.weight"
    assert name.name(name.values("layer.0.value.weight")) == "layer.0.value.weight"
    for other in ("layer.00.key.weight", "layer.0.query.weight", "xlayer.0.key.weight", "layer.0.key.weight.x"):
        assert name.values(other) is None


def test_axes_are_split_turned_and_joined():
    (rule,) = table("q.weight <-> q/w : (n h) d -> d n h")
    tensor = np.arange(24).reshape(12, 2)
    there = rearranged(rule.view(True), tensor.shape, {"n": 4, "h": 3})
    back = rearranged(rule.view(False), there.shape, {"n": 4, "h": 3})
    moved = tensor.reshape(there.split).transpose(there.order).reshape(there.shape)
    assert there.shape == (2, 4, 3)
    assert moved[1, 2, 0] == tensor[2 * 3 + 0, 1]
    assert (moved.reshape(back.split).transpose(back.order).reshape(back.shape) == tensor).all()


def test_entries_that_stay_in_order_are_known():
    def in_order(axes, shape):
        (rule,) = table(f"a <-> b : {axes}")
        return rearranged(rule.view(True), shape, {"n": 2}).in_order

    assert in_order("(n h) d -> n h d", (4, 3))
    assert in_order("a b -> b a", (1, 3))
    assert not in_order("a b -> b a", (2, 3))


@pytest.mark.parametrize(
    ("axes", "shape", "shortest"),
    [
        ("(n h) d -> d n h", (6, 4), ((6, 4), (1, 0))),
        ("o i h w -> h w i o", (2, 3, 4, 5), ((2, 3, 20), (2, 1, 0))),
        ("o i h w -> h w i o", (2, 1, 4, 5), ((2, 20), (1, 0))),
        ("a b c -> c a b", (2, 1, 3), ((2, 3), (1, 0))),
        ("a b -> a b", (2, 3), ((6,), (0,))),
    ],
)
def test_axes_that_stay_side_by_side_are_moved_as_one(axes, shape, shortest):
    (rule,) = table(f"a <-> b : {axes}")
    how = rearranged(rule.view(True), shape, {"n": 2})
    assert how.shortest == shortest
    tensor = np.arange(np.prod(shape))
    moved = tensor.reshape(how.split).transpose(how.order).reshape(-1)
    assert (tensor.reshape(shortest[0]).transpose(shortest[1]).reshape(-1) == moved).all()


@pytest.mark.parametrize("shape", [(13, 6), (12,), (12, 7), (2, 6, 6)])
def test_a_shape_that_does_not_fit_is_told_with_the_sizes_of_the_config(shape):
    sizes = sizes_of(FAMILIES["llama3"], CONFIG)
    with pytest.raises(CfmergeError) as error:
        translate({Q: (shape, F32)}, FAMILIES["llama3"], sizes)
    assert str(error.value) == f"{Q}: expected (n h) d with n = 4, h = 3, d = 6, found {shape}"


def test_tensors_that_do_not_fit_are_told_as_one_pattern():
    sizes = sizes_of(FAMILIES["llama3"], CONFIG)
    wrong = {f"model.layers.{n}.self_attn.q_proj.weight": ((5, 6), F32) for n in range(3)}
    with pytest.raises(CfmergeError, match=r"^model.layers.\{0..2\}.self_attn.q_proj.weight \(3 tensors\): expected"):
        translate(wrong, FAMILIES["llama3"], sizes)


def test_sizes_come_from_the_config_or_are_asked_for():
    family = FAMILIES["llama3"]
    assert sizes_of(family, CONFIG) == {"d": 6, "n": 4, "k": 2, "h": 3}
    assert sizes_of(family, {"hidden_size": 8, "num_attention_heads": 4}) == {"d": 8, "n": 4, "k": 4, "h": 2}
    assert sizes_of(family, {"text_config": CONFIG})["h"] == 3
    assert sizes_of(FAMILIES["bert"], {}) == {}
    with pytest.raises(CfmergeError, match=r"a config with hidden_size, num_attention_heads.*--config"):
        sizes_of(family, {})


# --- tables ------------------------------------------------------------------------------------------------------


def example(family, rule):
    """Names and shapes of a rule on the left, as a model may have them: two of each number, all words."""
    found = [{"_optional": ""}]
    for variable, words in rule.left.choices.items():
        found = [{**one, variable: word} for one in found for word in (words or ("0", "1"))]
    if rule.axes is None:
        return {rule.left.name(values): (3,) for values in found}
    sizes = {"n": 4, "k": 2, "h": 3, "d": 6}
    known = sizes if family.sizes else {}
    letters = {letter: known.get(letter, 2 + n) for n, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    shape = tuple(int(np.prod([letters[letter] for letter in group])) for group in rule.axes[0])
    return {rule.left.name(values): shape for values in found}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_every_rule_of_a_table_goes_there_and_back_bit_for_bit(name, dtype):
    family, rng = FAMILIES[name], np.random.default_rng(0)
    sizes = {"n": 4, "k": 2, "h": 3, "d": 6} if family.sizes else {}
    shapes = {tensor: shape for rule in family.rules for tensor, shape in example(family, rule).items()}
    tensors = {n: rng.integers(0, 256, (*s, dtype.itemsize), np.uint8).view(dtype)[..., 0] for n, s in shapes.items()}
    there = converted(tensors, name, sizes)
    assert not set(there) & set(tensors) or family.right == "HF-Flax"
    back = converted(there, name, sizes)
    assert set(back) == set(tensors)
    assert all(back[n].shape == t.shape and back[n].tobytes() == t.tobytes() for n, t in tensors.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_no_two_rules_of_a_table_say_something_of_one_name(name):
    rules = FAMILIES[name].rules
    for rule in rules:
        for tensor in example(FAMILIES[name], rule):
            assert sum(other.left.values(tensor) is not None for other in rules) == 1, tensor
            values = rule.left.values(tensor)
            assert sum(other.right.values(rule.right.name(values)) is not None for other in rules) == 1, tensor


def test_kernels_of_flax_lie_as_its_classes_want_them():
    tensors = {
        "bert.encoder.layer.0.output.dense.weight": np.arange(6.0).reshape(2, 3),
        "bert.embeddings.LayerNorm.weight": np.ones(2),
        "bert.embeddings.word_embeddings.weight": np.ones((4, 2)),
    }
    there = converted(tensors, "bert")
    assert there["bert/encoder/layer/0/output/dense/kernel"].shape == (3, 2)
    assert set(there) - {"bert/encoder/layer/0/output/dense/kernel"} == {
        "bert/embeddings/LayerNorm/scale", "bert/embeddings/word_embeddings/embedding",
    }  # fmt: skip
    patches = converted({"embeddings.patch_embeddings.projection.weight": np.zeros((5, 3, 2, 4))}, "vit")
    assert patches["embeddings/patch_embeddings/projection/kernel"].shape == (2, 4, 3, 5)
    block = converted({"h.0.attn.c_attn.weight": np.zeros((2, 6))}, "gpt2")
    assert block["h/0/attn/c_attn/kernel"].shape == (6, 2)


def test_experts_of_a_mixture_are_stacked_in_their_order_and_split_again():
    name = "model.layers.0.mlp.experts.{}.gate_proj.weight"
    tensors = {name.format(e): np.full((5, 6), e, np.float32) for e in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)}
    sizes = sizes_of(FAMILIES["qwen3"], CONFIG)
    there = converted(tensors, "qwen3", sizes)
    assert there["layers/0/mlp/gate_proj"].shape == (11, 6, 5)
    assert there["layers/0/mlp/gate_proj"][:, 0, 0].tolist() == list(range(11))
    back = converted(there, "qwen3", sizes)
    assert all((back[key] == tensor).all() for key, tensor in tensors.items())
    del tensors[name.format(4)]
    with pytest.raises(CfmergeError, match=r"layers/0/mlp/gate_proj: is stacked of 10 tensors, and .*experts.4.gate"):
        converted(tensors, "qwen3", sizes)
    tensors = {name.format(e): np.zeros((5 + e, 6), np.float32) for e in range(2)}
    with pytest.raises(CfmergeError, match="differ in shape or dtype"):
        converted(tensors, "qwen3", sizes)


def test_words_are_stacked_in_the_order_in_which_the_rule_lists_them():
    family = Family("other", table("a.{l}.{s=k|v}.weight <-> a/{l}/kv : o i -> s i o"))
    made = translate({f"a.0.{s}.weight": ((2, 3), F32) for s in "vk"}, family, {})
    assert made.headers == {"a/0/kv": ((2, 3, 2), F32)}
    assert {move.source: move.at for move in made.moves} == {"a.0.k.weight": 0, "a.0.v.weight": 6}
    with pytest.raises(CfmergeError, match=r"a.0.v.weight is missing"):
        translate({"a.0.k.weight": ((2, 3), F32)}, family, {})
    with pytest.raises(CfmergeError, match=r"expected 2 stacked tensors \(k, v\), found \(3, 3, 2\)"):
        translate({"a/0/kv": ((3, 3, 2), F32)}, family, {})


def test_gemma_stacks_all_projections_where_there_are_as_many_keys_as_queries():
    names = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
    tensors = {name: np.full((12, 6), n, np.float32) for n, name in enumerate(names)}
    there = converted(tensors, "gemma2", {"n": 4, "k": 4, "h": 3, "d": 6})
    assert there["layers/0/attn/qkv_einsum/w"].shape == (3, 4, 6, 3)
    assert there["layers/0/attn/qkv_einsum/w"][:, 0, 0, 0].tolist() == [0, 1, 2]
    tensors = {name: np.zeros((12 if "q_" in name else 6, 6), np.float32) for name in names}
    there = converted(tensors, "gemma2", {"n": 4, "k": 2, "h": 3, "d": 6})
    assert {name: tensor.shape for name, tensor in there.items()} == {
        "layers/0/attn/q_einsum/w": (4, 6, 3), "layers/0/attn/kv_einsum/w": (2, 2, 6, 3),
    }  # fmt: skip


# --- names as files have them ------------------------------------------------------------------------------------


def test_names_of_flax_are_known_with_dots_and_inside_other_levels():
    plain = {"bert/encoder/layer/0/output/dense/kernel": (3, 2), "bert/encoder/layer/0/output/dense/bias": (2,)}
    for spelt in (
        lambda name: name.replace("/", "."),
        lambda name: f"params/{name}",
        lambda name: f"params/params/{name}",
        lambda name: f"{name}/value",
    ):
        made = translate({spelt(name): (shape, F32) for name, shape in plain.items()}, FAMILIES["bert"], {})
        assert not made.forward
        assert set(made.headers) == {f"bert.encoder.layer.0.output.dense.{end}" for end in ("weight", "bias")}


def test_old_names_of_norms_are_read_and_told():
    made = translate(headers(embeddings__LayerNorm__gamma=(2,), embeddings__LayerNorm__beta=(2,)), FAMILIES["bert"], {})
    assert set(made.headers) == {"embeddings/LayerNorm/scale", "embeddings/LayerNorm/bias"}
    assert "old spelling" in made.notes[0]


def test_two_names_of_one_tensor_are_an_error():
    both = headers(embeddings__LayerNorm__gamma=(2,), embeddings__LayerNorm__weight=(2,))
    with pytest.raises(CfmergeError, match="another tensor becomes embeddings/LayerNorm/scale too"):
        translate(both, FAMILIES["bert"], {})


def test_buffers_and_tied_copies_are_left_out_with_a_note():
    names = headers(
        bert__embeddings__position_ids=(1, 4), cls__predictions__bias=(4,), cls__predictions__decoder__bias=(4,),
        bert__pooler__dense__bias=(2,), bert__other=(3,),
    )  # fmt: skip
    made = translate(names, FAMILIES["bert"], {}, again=lambda name: "x" if name == "bert.other" else None)
    assert "bert/other" not in made.headers
    assert [note.partition(":")[0] for note in made.notes] == ["bert.embeddings.position_ids", "bert.other"]


def test_a_name_without_a_rule_is_an_error_that_tells_patterns_and_the_family_that_fits():
    names = {f"bert.encoder.layer.{n}.output.dense.weight": ((2, 2), F32) for n in range(3)}
    odd = {f"bert.encoder.layer.{n}.gate.weight": ((2, 2), F32) for n in range(3)}
    with pytest.raises(
        CfmergeError, match=r"no rule .*HF-Flax's for bert.encoder.layer.\{0..2\}.gate.weight \(3 tensors\)"
    ):
        translate({**names, **odd}, FAMILIES["bert"], {}, others=FAMILIES)
    with pytest.raises(CfmergeError, match=r"--names bert has rules for 3 of 3 tensors"):
        translate(names, FAMILIES["t5"], {}, others=FAMILIES)


# --- files -------------------------------------------------------------------------------------------------------


def test_files_go_there_and_back(tmp_path, monkeypatch):
    """Through `convert`, in pieces that are smaller than a tensor; with a tie that is stored twice and a buffer."""
    from laid import laid

    from cfmerge.products import convert as product

    monkeypatch.setattr(product, "AT_ONCE", 40)
    rng = np.random.default_rng(0)
    shapes = {
        Q: (12, 6), "model.layers.0.self_attn.k_proj.weight": (6, 6), "model.layers.0.self_attn.o_proj.weight": (6, 12),
        "model.layers.0.mlp.experts.0.up_proj.weight": (5, 6), "model.layers.0.mlp.experts.1.up_proj.weight": (5, 6),
        "model.embed_tokens.weight": (9, 6), "lm_head.weight": (9, 6),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (2,),
    }  # fmt: skip
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    laid(tmp_path / "in", {"config.json": CONFIG, "model.safetensors": tensors})
    done = cfmerge.convert(tmp_path / "in", tmp_path / "there", names="qwen3")
    assert any("inv_freq: left out" in note for note in done.notes)
    assert done.tensors["layers/0/mlp/up_proj"] == ((2, 6, 5), F32)
    cfmerge.convert(tmp_path / "there", tmp_path / "back", names="qwen3")
    back = cfmerge.open_checkpoint(tmp_path / "back")
    del tensors["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert set(back.tensors) == set(tensors)
    assert all((back.read(name) == tensor).all() for name, tensor in tensors.items())


def test_a_config_elsewhere_is_named(tmp_path):
    from laid import laid

    laid(
        tmp_path, {"in/model.safetensors": {Q: np.zeros((12, 6), np.float32)}, "c/config.json": CONFIG, "bad.json": "["}
    )
    with pytest.raises(CfmergeError, match=r"/in: a config with .* is needed; name its config.json with --config"):
        cfmerge.convert(tmp_path / "in", tmp_path / "out", names="llama3")
    with pytest.raises(CfmergeError, match=r"bad.json: is no config.json that can be read"):
        cfmerge.convert(tmp_path / "in", tmp_path / "out", names="llama3", config=tmp_path / "bad.json")
    done = cfmerge.convert(tmp_path / "in", tmp_path / "out", names="llama3", config=tmp_path / "c")
    assert done.tensors == {"layers/0/attn/q_proj/w": ((6, 4, 3), F32)}
