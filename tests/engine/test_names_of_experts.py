"""Experts whose tensors have other names or forms than the base's, and experts that are parts of it."""

import json

import numpy as np
import pytest

import cfmerge
from cfmerge import Expert
from cfmerge.errors import CfmergeError
from cfmerge.recipe import Rename, parse

SHAPES = {
    "model.embed_tokens.weight": (12, 8), "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.1.mlp.up_proj.weight": (16, 8), "model.norm.weight": (8,), "lm_head.weight": (12, 8),
}  # fmt: skip
UP = "model.layers.0.mlp.up_proj.weight"


def tensors(number=0, shapes=SHAPES):
    """Of the base for 0, of experts for 1, 2, ..."""
    common, own = np.random.default_rng(0), np.random.default_rng(100 + number)
    scale = 0.05 if number else 0.0
    return {
        name: (common.standard_normal(shape) + scale * own.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def renamed(given, change):
    return {change(name): tensor for name, tensor in given.items()}


@pytest.fixture
def merge(make_model, tmp_path, load):
    """`merge(base, experts, ...)` of tensors (or of (tensors, config)): the merged tensors, and the result."""
    made = iter(range(100))

    def place(given, config):
        given, config = given if isinstance(given, tuple) else (given, config)
        return make_model(tmp_path / f"m{next(made)}", given, config)

    def run(base, experts, method="average", config=None, told=(), **options):
        paths = [place(given, config) for given in (base, *experts)]
        specs = [Expert(str(path), path.name, **more) for path, more in zip(paths[1:], told or [{}] * 9, strict=False)]
        output = tmp_path / f"out{next(made)}"
        result = cfmerge.merge(paths[0], specs, method, output=output, **options)
        return load(output), result

    return run


def assert_mean(found, experts, names=None):
    for name in names or experts[0]:
        wanted = sum(expert[name].astype(float) for expert in experts) / len(experts)
        np.testing.assert_allclose(found[name], wanted, atol=2e-6, err_msg=name)


def to_new(name):
    """As transformers 5 calls the parts of a vision-language model."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else "model." + name


VLM = {**SHAPES, "visual.blocks.0.attn.qkv.weight": (24, 8), "visual.merger.weight": (8, 8)}


@pytest.mark.parametrize("newer", ["base", "experts"])
def test_names_of_two_versions_of_a_library(merge, newer):
    experts = [tensors(number, VLM) for number in (1, 2)]
    new = [renamed(expert, lambda n: n if n == "lm_head.weight" else to_new(n)) for expert in experts]
    base = tensors(0, VLM)
    if newer == "base":
        base, new, experts = renamed(base, lambda n: n if n == "lm_head.weight" else to_new(n)), experts, new
    found, result = merge(base, new)
    assert set(found) == set(base)
    assert_mean(found, experts)
    assert sum("known under another name" in note for note in result.notes) == 2


MIXTURE = {
    "model.embed_tokens.weight": (12, 8), "model.layers.0.mlp.gate.weight": (3, 8),
    **{f"model.layers.0.mlp.experts.{e}.{w}_proj.weight": (8, 5) if w == "down" else (5, 8)
       for e in range(3) for w in ("gate", "up", "down")},
}  # fmt: skip


def packed(given):
    at = "model.layers.0.mlp.experts."
    rest = {name: tensor for name, tensor in given.items() if not name.startswith(at)}
    up = [np.concatenate([given[f"{at}{e}.{w}_proj.weight"] for w in ("gate", "up")]) for e in range(3)]
    down = [given[f"{at}{e}.down_proj.weight"] for e in range(3)]
    return {**rest, at + "gate_up_proj": np.stack(up), at + "down_proj": np.stack(down)}


@pytest.mark.parametrize("base_packed", [False, True])
@pytest.mark.parametrize("method", ["average", "ace"])
def test_packed_and_split_experts_of_a_mixture(merge, base_packed, method):
    """The output has the base's form, and is what experts in the base's form give."""
    config = {"model_type": "qwen3_moe", "tie_word_embeddings": False}
    one, two = tensors(1, MIXTURE), tensors(2, MIXTURE)
    wrapped = renamed(packed(one), lambda name: "module." + name)
    form = packed if base_packed else dict
    base = form(tensors(0, MIXTURE))
    wanted, _ = merge(base, [form(one), form(two)], method, config)
    found, result = merge(base, [wrapped, two], method, config)
    assert set(found) == set(base)
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-5, err_msg=name)
    assert any("another form" in note for note in result.notes)
    if method == "ace":
        assert result.plan.counts()["matrix", "ace"] == (3 if base_packed else 10)


def test_what_a_matrix_method_does_not_solve_is_told(merge):
    shapes = {
        UP: (16, 8),
        **{f"model.layers.{n}.strange": (3, 8, 6) for n in range(2)},
        "depthwise.weight": (8, 1, 3, 3),
    }
    notes = merge(tensors(0, shapes), [tensors(1, shapes), tensors(2, shapes)], "ace")[1].notes
    (told,) = [note for note in notes if "strange" in note]
    assert told.startswith("model.layers.{0..1}.strange (2 tensors): averaged, not solved by ace")
    assert '--rule "match=model.layers.*.strange, layout=boi"' in told
    assert any("depthwise" in note for note in notes)
    assert not any(
        "strange" in note
        for note in merge(tensors(0, shapes), [tensors(1, shapes)] * 1 + [tensors(2, shapes)])[1].notes
    )


# --- ties ---------------------------------------------------------------------------------------------------------

TABLE = "shared.weight"
T5 = {TABLE: (12, 8), "encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8), "lm_head.weight": (12, 8)}
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def with_copies(given, names=COPIES, of=TABLE):
    return {**given, **{name: given[of].copy() for name in names}}


@pytest.mark.parametrize("tied", [True, False, None])
@pytest.mark.parametrize("who", ["base", "expert"])
@pytest.mark.parametrize("model", ["t5", "unheard_of"])
def test_copies_that_only_some_models_store(merge, who, tied, model):
    config = {"model_type": model} | ({} if tied is None else {"tie_word_embeddings": tied})
    names = COPIES if model == "t5" else ("some.table.weight", "another.table.weight")
    shapes = {name: shape for name, shape in T5.items() if not tied or "head" not in name}
    base, one, two = (tensors(number, shapes) for number in range(3))
    full = with_copies(base if who == "base" else one, names)
    found, _ = merge(*((full, [one, two]) if who == "base" else (base, [full, two])), config=config)
    assert_mean(found, [one, two])
    assert set(found) == {*shapes, *(names if who == "base" else ())}
    for name in names if who == "base" else ():
        assert np.array_equal(found[name], found[TABLE])


def test_copies_are_drawn_once(merge):
    """A random method treats what is one tensor in every model as one, whatever its names and the config."""
    shapes = {"x.table.weight": (12, 8), UP: (16, 8)}
    models = [with_copies(tensors(n, shapes), ("y.output.weight",), "x.table.weight") for n in range(3)]
    found, result = merge(models[0], models[1:], "drop(p=0.5) >> task_arithmetic(scale=0.5)")
    assert np.array_equal(found["x.table.weight"], found["y.output.weight"])
    assert any("y.output.weight" in note and "merged once" in note for note in result.notes)


def test_copies_that_the_base_stores_too_are_no_copies_left_out(merge):
    shapes = {"x.table.weight": (12, 8), UP: (16, 8)}
    models = [with_copies(tensors(n, shapes), ("y.output.weight",), "x.table.weight") for n in range(3)]
    _, result = merge(models[0], models[1:])
    assert not any("stores it once" in note for note in result.notes)


def test_buffers_that_are_alike_are_not_told_as_ties(merge):
    masks = {f"h.{n}.attn.bias": np.tril(np.ones((1, 1, 4, 4), np.float32)) for n in range(2)}
    _, result = merge(tensors() | masks, [tensors(n) | masks for n in (1, 2)])
    assert [note for note in result.notes if "attn.bias" in note] == [
        "h.{0..1}.attn.bias (2 tensors): buffers, which are no parameters; the output has the base's"
    ]


def test_the_bias_of_an_output_that_some_libraries_store(merge):
    """BART makes it anew where it is missing; it is merged where all models have it."""
    base, one, two = ({"final_logits_bias": np.full((1, 12), value, np.float32)} for value in (0, 1, 3))
    found, _ = merge(tensors() | base, [tensors(1) | one, tensors(2) | two])
    assert (found["final_logits_bias"] == 2).all()
    found, result = merge(tensors() | base, [tensors(1), tensors(2) | two])
    assert (found["final_logits_bias"] == 0).all()
    assert any("final_logits_bias" in note and "buffers" in note for note in result.notes)
    found, result = merge(tensors(), [tensors(1), tensors(2) | two])
    assert "final_logits_bias" not in found
    assert any("final_logits_bias" in note and "the base lacks" in note for note in result.notes)


@pytest.mark.parametrize("differs", ["base", "expert"])
def test_what_differs_in_one_model_is_not_tied(merge, differs):
    """A family's custom is no judge: each tensor is merged by itself."""
    config = {"model_type": "bloom"}
    shapes = {"transformer.word_embeddings.weight": (12, 8), "lm_head.weight": (12, 8)}
    apart = [tensors(number, shapes) for number in range(3)]
    models = [with_copies({"transformer.word_embeddings.weight": m["transformer.word_embeddings.weight"]},
                          ("lm_head.weight",), "transformer.word_embeddings.weight") for m in apart]  # fmt: skip
    models[0 if differs == "base" else 1] = apart[0 if differs == "base" else 1]
    found, result = merge(models[0], models[1:], config=config)
    assert_mean(found, models[1:])
    assert any("each is merged by itself" in note for note in result.notes)


def test_zeros_in_every_model_are_no_tie(merge):
    zeros = {"a.weight": np.zeros((4, 4), np.float32), "b.weight": np.zeros((4, 4), np.float32)}
    _, result = merge(tensors() | zeros, [tensors(n) | zeros for n in (1, 2)])
    assert {"a.weight", "b.weight"} <= {job.name for job in result.plan.jobs}


def test_a_rule_for_one_of_two_copies_parts_them(merge):
    shapes = {"x.table.weight": (12, 8), UP: (16, 8)}
    models = [with_copies(tensors(n, shapes), ("y.output.weight",), "x.table.weight") for n in range(3)]
    rules = [{"match": "y.*", "method": "keep-base"}]
    found, _ = merge(models[0], models[1:], rules=rules)
    assert np.array_equal(found["y.output.weight"], models[0]["y.output.weight"])
    assert_mean(found, models[1:], ["x.table.weight"])


# --- buffers ------------------------------------------------------------------------------------------------------

FREQUENCIES = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.float32([1, 0.1, 0.01])}
MASK = {"model.attn_mask": np.triu(np.full((3, 3), -np.inf, np.float32), 1)}
IDS = {"model.position_ids": np.arange(4)[None]}


@pytest.mark.parametrize("lacks", ["nobody", "base", "expert"])
@pytest.mark.parametrize("buffer", [FREQUENCIES, MASK, IDS], ids=["inv_freq", "mask", "ids"])
def test_buffers_are_the_bases_wherever_they_are(merge, buffer, lacks):
    base, one, two = (tensors(n) | buffer for n in range(3))
    for model in {"nobody": [], "base": [base], "expert": [one]}[lacks]:
        del model[next(iter(buffer))]
    found, _ = merge(base, [one, two], dtype="float16")
    assert set(found) == set(base)
    for name in set(buffer) & set(base):
        assert found[name].dtype == buffer[name].dtype
        assert np.array_equal(found[name], buffer[name])


def test_a_buffer_in_another_dtype_or_value_is_told(merge):
    halves = {"model.position_ids": np.arange(4, dtype=np.float16)[None]}
    other = {next(iter(FREQUENCIES)): np.float32([1, 2, 3])}
    found, result = merge(tensors() | IDS | FREQUENCIES, [tensors(1) | halves | other, tensors(2) | IDS])
    assert np.array_equal(found["model.position_ids"], np.arange(4)[None])
    assert np.array_equal(found[next(iter(FREQUENCIES))], FREQUENCIES[next(iter(FREQUENCIES))])
    assert any("position_ids" in note and "inv_freq" in note and "base's" in note for note in result.notes)


def test_a_kept_tensor_of_no_known_kind_may_be_infinite(merge):
    own = {"custom.limits": np.float32([[0, -np.inf], [np.inf, 0]])}
    rules = [{"match": "custom.limits", "method": "keep-base"}]
    found, _ = merge(tensors() | own, [tensors(1) | own, tensors(2) | own], rules=rules)
    assert np.array_equal(found["custom.limits"], own["custom.limits"])


# --- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["fc", "classifier.6", "out"])
def test_last_layers_of_other_class_counts_are_heads(merge, head):
    def model(number, classes):
        own = {f"{head}.weight": np.full((classes, 8), number), f"{head}.bias": np.full(classes, number)}
        return tensors(number, {UP: (16, 8), "norm.weight": (8,)}) | {n: t.astype(np.float32) for n, t in own.items()}

    models = [model(0, 10), model(1, 3), model(2, 4)]
    with pytest.raises(CfmergeError, match=r"heads that the models do not share:(?s:.*)--heads keep-base"):
        merge(models[0], models[1:])
    found, result = merge(models[0], models[1:], heads="export")
    assert_mean(found, models[1:], [UP])
    assert (found[f"{head}.weight"] == 0).all()
    assert len(list((result.output / "heads").iterdir())) == 2


# --- renames that the recipe gives --------------------------------------------------------------------------------


def strange(given):
    return renamed(given, lambda name: name.replace("model.layers", "net/block").replace("up_proj", "lift"))


LIFT = [Rename(r"^net/block", "model.layers"), Rename(r"\.(\w+)\.lift\.", r".\1.up_proj.")]


def test_renames_of_an_expert_and_of_all(merge):
    experts = [tensors(1), tensors(2)]
    found, _ = merge(tensors(), [strange(experts[0]), experts[1]], told=[{"rename": LIFT}, {}])
    assert_mean(found, experts)
    found, _ = merge(tensors(), [strange(experts[0]), strange(experts[1])], rename=LIFT)
    assert_mean(found, experts)


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        ([Rename("^nothing", "x")], "rename '^nothing' matches none of its tensors; names look like"),
        ([Rename(r"layers\.\d", "layers.0")], "the same name 'model.layers.0.mlp.up_proj.weight'"),
        ([Rename("(norm)", r"\2")], "rename '(norm)' to"),
    ],
)
def test_renames_that_cannot_be(merge, rename, words):
    with pytest.raises(CfmergeError) as caught:
        merge(tensors(), [tensors(1), tensors(2)], told=[{"rename": rename}, {}])
    assert words in str(caught.value)
    assert "m1" in str(caught.value) or "norm" in words


def test_a_rename_of_all_must_match_some_expert(merge):
    with pytest.raises(CfmergeError, match=r"'\^nothing' matches no tensor of any expert"):
        merge(tensors(), [tensors(1), tensors(2)], rename=[Rename("^nothing", "x")])


def test_renames_in_a_recipe():
    content = {"base": "b", "rename": [{"from": "a", "to": "b"}], "experts": ["x", {"path": "y", "partial": True}]}
    recipe = parse(content, "test")
    assert recipe.rename == [Rename("a", "b")]
    assert recipe.resolved_experts()[1].partial
    assert '"from": "a"' in json.dumps(__import__("yaml").safe_load(recipe.to_yaml()))
    for bad, words in (({"form": "a", "to": "b"}, "did you mean 'from'"), ({"from": "(", "to": "b"}, "no regular")):
        with pytest.raises(CfmergeError, match=words):
            parse(content | {"rename": [bad]}, "test")


# --- parts --------------------------------------------------------------------------------------------------------


def part(given, *starts):
    return {name: tensor for name, tensor in given.items() if name.startswith(starts)}


@pytest.mark.parametrize(
    "method", ["average", "task_arithmetic(scale=1.0)", "ace", "trim(density=0.5, scope='model') >> average"]
)
def test_a_partial_expert_takes_part_where_it_has_tensors(merge, method):
    """Elsewhere the merge is that of the others; what none has stays at the base; the rest of it is left out."""
    one, two = tensors(1, VLM), tensors(2, VLM)
    extra = {"projector.weight": np.ones((3, 3), np.float32)}
    tower, text = part(one, "visual.") | extra, part(two, "visual.", "model.layers")
    found, result = merge(tensors(0, VLM), [tower, text], method, told=[{"partial": True}] * 2)
    full, _ = merge(part(tensors(0, VLM), "visual."), [part(one, "visual."), part(two, "visual.")], method)
    alone, _ = merge(tensors(0, VLM), [two], method, allow=["one-expert"])
    for name, tensor in found.items():
        if "scope" in method and "layers" in name:
            continue  # its threshold is that of the whole model
        wanted = full[name] if name in full and "scope" not in method else alone[name] if "layers" in name else None
        if wanted is not None:
            np.testing.assert_allclose(tensor, wanted, atol=2e-5, err_msg=name)
    for name in ("lm_head.weight", "model.norm.weight"):
        assert np.array_equal(found[name], tensors(0, VLM)[name])
    assert any("projector.weight" in note and "left out" in note for note in result.notes)
    assert sum("is partial" in note for note in result.notes) == 2


def test_a_language_model_in_a_vision_language_model(merge):
    """Two experts of the language model alone, called as it is called alone."""
    base = renamed(tensors(0, VLM), lambda n: "language_model." + n if not n.startswith("visual") else n)
    experts = [tensors(1), tensors(2)]
    found, _ = merge(base, experts, told=[{"partial": True}] * 2)
    for name in SHAPES:
        assert_mean({name: found["language_model." + name]}, experts, [name])
    assert np.array_equal(found["visual.merger.weight"], base["visual.merger.weight"])


def test_a_part_without_leave_is_told_as_a_pattern(merge):
    with pytest.raises(CfmergeError) as caught:
        merge(tensors(0, VLM), [part(tensors(n, VLM), "model.") for n in (1, 2)])
    message = str(caught.value)
    assert "lacks 2 tensors of the base: visual.*" in message
    assert '--rule "match=visual.*, method=keep-base"' in message


def test_a_method_for_two_needs_two_where_one_is_partial(merge):
    with pytest.raises(CfmergeError, match=r"takes at least 2 experts, found 1 that have it.*method=average"):
        merge(tensors(), [part(tensors(1), "model.layers"), tensors(2)], "model_stock", told=[{"partial": True}, {}])
