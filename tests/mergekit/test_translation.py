"""mergekit's configurations become the recipes that do the same."""

import json

import msgspec
import pytest
import yaml

from cfmerge import methods
from cfmerge.core.numbers import Place, at
from cfmerge.core.registry import registry
from cfmerge.mergekit import translated
from cfmerge.mergekit.methods import METHODS, NAMES
from cfmerge.recipe import LayerExpert, Layers, Recipe

WEIGHTED = [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": "1e-1"}}]
PLAIN = [{"model": "a"}, {"model": "b"}]
ONE = [{"model": "a"}]


def recipe(content) -> Recipe:
    """The recipe of a configuration of one document."""
    (stage,) = translated(yaml.safe_dump(content), "x.yml")
    return stage.recipe


def configured(method, parameters=None, models=WEIGHTED, **keys):
    content = {"merge_method": method, "base_model": "base", "models": models, **keys}
    return {key: value for key, value in content.items() if value is not None} | (
        {"parameters": parameters} if parameters else {}
    )


# A configuration, the method that it becomes, and the parameters that are said.
TABLE = {
    "linear": (configured("linear", base_model=None), "linear", {"normalise": True}),
    "linear, a sum": (configured("linear", {"normalize": False}, base_model=None), "linear", {"normalise": False}),
    "slerp": (configured("slerp", {"t": 0.3}, ONE), "slerp", {"t": 0.3}),
    "nuslerp": (
        configured("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}), "nuslerp",
        {"flatten": False, "row_wise": True, "on": "deltas"},
    ),
    "nuslerp without a base": (
        configured("nuslerp", base_model=None), "nuslerp", {"flatten": True, "row_wise": False, "on": "weights"},
    ),
    "multislerp": (
        configured("multislerp", {"normalize_weights": False}), "multislerp",
        {"normalise_weights": False, "eps": 1e-8, "on": "deltas"},
    ),
    "karcher": (
        configured("karcher", {"max_iter": 5}, PLAIN, base_model=None), "karcher",
        {"max_iter": 5, "tol": 1e-5, "with_base": False},
    ),
    "karcher with a base": (
        configured("karcher", {"tol": "1e-6"}, PLAIN), "karcher", {"max_iter": 10, "tol": 1e-6, "with_base": True},
    ),
    "task_arithmetic": (
        configured("task_arithmetic", {"lambda": 0.7}), "task_arithmetic", {"scale": 0.7, "normalise": False},
    ),
    "ties": (
        configured("ties", {"density": 0.3}), "ties",
        {"scale": 1.0, "combine": "mean", "rescale": "none", "density": 0.3, "variant": "mergekit", "count": "some"},
    ),
    "ties, a sum, rescaled": (
        configured("ties", {"normalize": False, "rescale": True, "lambda": [0.5, 1]}), "ties",
        {"scale": {"gradient": [0.5, 1.0]}, "combine": "sum", "rescale": "l1", "density": 1.0, "variant": "mergekit",
         "count": "some"},
    ),
    "dare_linear": (
        configured("dare_linear", {"density": 0.3}), "dare_linear",
        {"scale": 1.0, "normalise": False, "rescale": "l1", "p": 0.7},
    ),
    "dare_ties, a density each": (
        configured("dare_ties", {"rescale": False}, [
            {"model": "a", "parameters": {"weight": 1, "density": [0.2, 0.4]}},
            {"model": "b", "parameters": {"weight": 1, "density": [{"filter": "mlp", "value": 0.9}]}},
        ]), "dare_ties",
        {"scale": 1.0, "combine": "sum", "rescale": "none", "zero": "positive", "p": {"experts": {
            "a": {"gradient": [0.8, 0.6]}, "b": [{"match": "*mlp*", "value": 0.1}, {"value": 0.0}],
        }}},
    ),
    "della": (
        configured("della", {"density": 0.5}), "della",
        {"scale": 1.0, "combine": "mean", "rescale": "l1", "density": 0.5, "epsilon": 0.15, "zero": "positive"},
    ),
    "della_linear, all of one model": (
        configured("della_linear", {"epsilon": 0.1}, [
            {"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 1, "density": 0.5}},
        ]), "della_linear",
        {"scale": 1.0, "normalise": False, "rescale": "l1", "density": {"experts": {"a": 1.0, "b": 0.5}},
         "epsilon": {"experts": {"a": 0.0, "b": 0.1}}},
    ),
    "breadcrumbs": (
        configured("breadcrumbs", {"density": 0.9}), "breadcrumbs",
        {"scale": 1.0, "normalise": False, "rescale": "none", "density": 0.9, "gamma": 0.01},
    ),
    "breadcrumbs_ties": (
        configured("breadcrumbs_ties", {"density": 0.9, "gamma": 0.02}), "breadcrumbs_ties",
        {"scale": 1.0, "combine": "sum", "rescale": "none", "density": 0.9, "gamma": 0.02, "zero": "positive"},
    ),
    "model_stock": (
        configured("model_stock", {"filter_wise": True}, PLAIN), "model_stock", {"filter_wise": True, "clamp": False},
    ),
    "sce": (configured("sce", {"select_topk": 0.1}, PLAIN), "sce", {"density": 0.1, "uniform_below": 1e-6}),
    "ram": (configured("ram", {"epsilon": 0.1}, PLAIN), "ram", {"threshold": 0.1}),
    "ramplus_tl": (
        configured("ramplus_tl", {"r": 0.2}, PLAIN), "ram_plus", {"threshold": 1e-5, "r": 0.2, "alpha": 0.2},
    ),
    "nearswap": (configured("nearswap", {"t": 0.001}, ONE), "nearswap", {"t": 0.001}),
    "arcee_fusion": (configured("arcee_fusion", None, ONE), "arcee_fusion", {}),
}  # fmt: skip


@pytest.mark.parametrize("label", TABLE)
def test_a_configuration_becomes_the_method_that_does_the_same(label):
    content, method, parameters = TABLE[label]
    made = recipe(content)
    assert (made.method, made.parameters) == (method, parameters)
    methods.make(made.method, made.parameters)  # every parameter is one of the method's
    base = "base" if "base_model" in content else "a"
    assert made.base == base
    weights = {one["model"]: one.get("parameters", {}).get("weight", 1.0) for one in content["models"]}
    assert {one.path: one.weight for one in made.experts} == {path: float(w) for path, w in weights.items()}
    assert made.allow == (["one-expert"] if len(weights) == 1 else []) + (["base-as-expert"] if base == "a" else [])
    assert not made.layers


def test_all_20_methods_have_a_counterpart():
    assert len(METHODS) == 20
    assert {label.split(",")[0].split()[0] for label in TABLE} | {"passthrough"} == set(METHODS)
    assert set(NAMES) <= set(registry())


def test_passthrough_copies_a_model_and_scales_tensors_of_it():
    assert recipe(configured("passthrough", None, ONE, base_model=None)).layers == [Layers(experts=[])]
    scale = [{"filter": "o_proj", "value": 0.0}, {"filter": "mlp", "value": [0.5, 1]}]
    made = recipe(configured("passthrough", {"scale": scale}, ONE, base_model=None))
    assert (made.base, made.experts) == ("a", [])
    assert made.layers == [Layers(experts=[], scale=[
        {"match": "*o_proj*", "value": 0.0}, {"match": "*mlp*", "value": {"gradient": [0.5, 1.0]}}, {"value": 1.0},
    ])]  # fmt: skip


def value(form, name, depth=0.0, experts=("a", "b")):
    """A form of a recipe's number, at a tensor."""
    from fnmatch import fnmatchcase

    return at(form, Place(name, depth, experts, fnmatchcase), "it")


def test_scopes_are_asked_from_the_nearest_and_a_filter_without_a_hit_asks_the_next():
    of_a = [{"filter": "mlp", "value": [0, 1, 4]}, {"filter": "x[1]", "value": 9}]
    of_all = [{"filter": "norm", "value": 7}, {"filter": "*", "value": [1, 3]}]
    models = [{"model": "a", "parameters": {"weight": of_a}}, {"model": "b", "parameters": {"weight": 0.5}}]
    content = configured("task_arithmetic", {"weight": of_all}, models)
    first, second = recipe(content).experts
    assert second.weight == 0.5
    assert value(first.weight, "layers.0.mlp.up", 0.25) == 0.5
    assert value(first.weight, "layers.0.norm", 0.25) == 7
    assert value(first.weight, "layers.0.attn", 0.25) == 1.5
    assert value(first.weight, "x[1]") == 9
    assert value(first.weight, "x1") == 1  # brackets are no glob


def test_a_base_that_is_listed_among_the_models_is_the_base_alone():
    made = recipe(configured("ties", None, [{"model": "base"}, *WEIGHTED]))
    assert (made.base, [one.path for one in made.experts]) == ("base", ["a", "b"])
    made = recipe(configured("slerp", {"t": 0.5}, [{"model": "a"}, {"model": "base"}]))
    assert (made.base, [one.path for one in made.experts]) == ("base", ["a"])


def test_linear_takes_the_base_as_one_more_model():
    """As mergekit does, with the document's weight."""
    made = recipe(configured("linear", {"weight": 0.25}))
    assert [(one.path, one.weight) for one in made.experts] == [("a", 0.5), ("b", 0.1), ("base", 0.25)]
    assert made.allow == ["base-as-expert"]


@pytest.mark.parametrize(
    ("given", "dtype", "precision"),
    [
        ({}, None, "auto"), ({"dtype": "bfloat16"}, "bfloat16", "auto"),
        ({"dtype": "float32", "out_dtype": "torch.float16"}, "float16", "auto"),
        ({"dtype": "float64", "out_dtype": "float32"}, "float32", "float64"),
    ],
)  # fmt: skip
def test_dtypes(given, dtype, precision):
    made = recipe(configured("ties", **given))
    assert (made.dtype, made.precision) == (dtype, precision)


@pytest.mark.parametrize("template", ["auto", "chatml", "{{ messages }}"])
def test_chat_templates(template):
    assert recipe(configured("ties", chat_template=template)).chat_template == template
    assert recipe(configured("ties")).chat_template is None


# --- models ---------------------------------------------------------------------------------------------------------


def test_a_revision_stays_with_its_name_and_a_path_that_exists_is_taken_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@b+c").mkdir()
    models = [{"model": "a@b+c", "parameters": {"weight": 1}}, {"model": "org/name@main", "parameters": {"weight": 1}}]
    made = recipe(configured("ties", None, models))
    assert [one.path for one in made.experts] == ["a@b+c", "org/name@main"]
    nested = {"model": {"path": "org/name", "revision": "main"}}
    made = recipe(configured("ties", None, [{"model": nested, "parameters": {"weight": 1}}]))
    assert [one.path for one in made.experts] == ["org/name@main"]


@pytest.mark.parametrize("model", ["a+lora", {"model": "a", "lora": "lora"}])
def test_an_adapter_goes_to_its_expert(model):
    content = configured("ties", None, [{"model": model, "parameters": {"weight": 1}}])
    (expert,) = recipe(content).experts
    assert (expert.path, expert.adapter) == ("a", "lora")


def test_adapters_that_are_averaged_need_no_model_of_their_own():
    """Any base gives the same mean: theirs, without an adapter."""
    content = configured("linear", None, [
        {"model": f"a+{name}", "parameters": {"weight": 1}} for name in ("one", "two")
    ], base_model=None)  # fmt: skip
    made = recipe(content)
    assert (made.base, made.allow) == ("a", [])
    assert [(one.path, one.adapter) for one in made.experts] == [("a", "one"), ("a", "two")]


@pytest.mark.parametrize("source", ["union", "base", "a"])
def test_a_tokenizer_source_is_the_vocabulary(source):
    for key in ({"tokenizer_source": source}, {"tokenizer": {"source": source}}):
        assert recipe(configured("ties", **key)).vocabulary == source


# --- slices ---------------------------------------------------------------------------------------------------------


def source(model, first, end, **parameters):
    return {"model": model, "layer_range": [first, end], **({"parameters": parameters} if parameters else {})}


def test_a_frankenmerge():
    slices = [
        {"sources": [source("a", 0, 16)]}, {"sources": [source("b", 8, 24)]},
        {"sources": [source("a", 16, 32, scale=[{"filter": "o_proj", "value": 0}])], "parameters": {"scale": 1}},
    ]  # fmt: skip
    made = recipe({"merge_method": "passthrough", "slices": slices})
    assert made.base == "a"
    assert made.layers == [
        Layers((0, 16), experts=[]), Layers((8, 24), "b", []),
        Layers((16, 32), experts=[], scale=[{"match": "*o_proj*", "value": 0.0}, {"value": 1.0}]),
    ]  # fmt: skip
    made = recipe({"merge_method": "passthrough", "slices": slices, "base_model": "b"})
    assert (made.base, [run.base for run in made.layers]) == ("b", ["a", "", "a"])


def test_slices_of_one_range_that_is_all_layers_are_as_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {
        "merge_method": "slerp", "base_model": "a", "parameters": {"t": [0, 1]},
        "slices": [{"sources": [source("a", 0, 4), source("b", 0, 4)]}],
    }  # fmt: skip
    made = recipe(content)  # a is not here: nobody knows how many layers it has
    assert made.layers == [Layers((0, 4), experts=["b"], parameters={"t": {"gradient": [0.0, 1.0]}})]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    made = recipe(content)
    assert (made.layers, made.parameters) == ([], {"t": {"gradient": [0.0, 1.0]}})
    (tmp_path / "a" / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 8}}))
    assert recipe(content).layers


def test_slices_with_weights_and_ranges_of_their_own():
    content = {
        "merge_method": "ties", "base_model": "base", "parameters": {"density": 0.5, "weight": 1.0},
        "slices": [
            {"sources": [source("base", 0, 2), source("a", 0, 2, weight=[0, 1]), source("b", 1, 3, density=0.2)]},
            {"sources": [source("base", 2, 4), source("a", 2, 4)], "parameters": {"weight": 0.3}},
        ],
    }  # fmt: skip
    made = recipe(content)
    assert [(one.name, one.weight) for one in made.experts] == [("a", 1.0), ("b", 1.0)]
    first, second = made.layers
    assert first.experts == [LayerExpert("a", weight={"gradient": [0.0, 1.0]}), LayerExpert("b", (1, 3))]
    assert first.parameters["density"] == {"experts": {"a": 0.5, "b": 0.2}}
    assert second.experts == [LayerExpert("a", weight=0.3)]
    assert second.parameters["density"] == 0.5
    assert (made.method, made.parameters) == ("ties", {})


def test_what_no_slice_changes_is_said_once():
    content = {
        "merge_method": "slerp", "base_model": "a", "parameters": {"t": 0.5},
        "slices": [
            {"sources": [source("a", 0, 2), source("b", 0, 2)]}, {"sources": [source("c", 1, 3), source("b", 1, 3)],
                                                                  "base_model": "c"},
        ],
    }  # fmt: skip
    made = recipe(content)
    assert made.parameters == {"t": 0.5}
    assert made.layers == [Layers((0, 2), experts=["b"]), Layers((1, 3), "c", ["b"])]


# --- chains ---------------------------------------------------------------------------------------------------------


def test_named_documents_are_inputs_of_later_ones(tmp_path):
    from cfmerge.mergekit import located

    models = [{"model": "first", "parameters": {"weight": 1}}, *WEIGHTED]
    contents = [
        configured("linear", None, models, name="second", base_model=None),
        configured("ties", name="first"),
        configured("slerp", {"t": 0.5}, [{"model": "second"}], base_model="first"),
    ]
    texts = map(yaml.safe_dump, contents)
    stages = translated("---\n".join(texts), "chain.yml")
    assert [stage.name for stage in stages] == ["first", "second", ""]
    placed = located(stages, tmp_path / "OUT-stages")
    assert placed[1].recipe.base == str(tmp_path / "OUT-stages" / "first")
    assert [one.name for one in placed[1].recipe.experts] == ["first", "a", "b"]
    assert placed[2].recipe.experts[0].path == str(tmp_path / "OUT-stages" / "second")
    assert placed[0].recipe == stages[0].recipe


def test_a_recipe_of_mergekit_survives_its_yaml():
    content = configured("ties", {"lambda": [0.5, 1], "density": [{"filter": "mlp", "value": [0.1, 0.5]}]})
    made = recipe(content)
    assert msgspec.convert(yaml.safe_load(made.to_yaml()), Recipe) == made
    assert msgspec.convert(yaml.safe_load(made.brief()), Recipe) == made
    assert "null" not in made.brief()
