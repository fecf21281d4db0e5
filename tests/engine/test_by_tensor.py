"""Numbers that differ: by depth in the network, by name, by expert; methods by kind; and still one batch of tensors."""

import warnings

import jax
import numpy as np
import pytest
import toys
import yaml

import cfmerge
from cfmerge import methods
from cfmerge.engine import cutting, inputs, steps
from cfmerge.errors import CfmergeError
from cfmerge.planning import depth as resolve
from cfmerge.recipe import load as load_recipe

LAYERS = "model.layers.{}.self_attn.q_proj.weight"
UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def own():
    with toys.registered(toys.times, toys.deeper, toys.middle, toys.squares) as made:
        yield made


@pytest.fixture
def merged(family, tmp_path, load):
    """`merged(method, ...)`: the deltas of the merge on disk, which must be those of the merge in memory."""

    def run(method="task_arithmetic", parameters=None, experts=None, weights=None, **options):
        named = experts or {path.name: path for path in family.experts}
        result = cfmerge.merge(family.base, named, method, parameters=parameters, output=tmp_path / "out", **options)
        found = load(result.output)
        trees = dict(zip(["m1", "m2", "m3"], family.tensors[1:], strict=True))
        made = methods.make(method, parameters)
        again = cfmerge.merge_params(family.tensors[0], trees, made, weights=weights, rules=options.get("rules", ()))
        for name, tensor in found.items():
            np.testing.assert_allclose(tensor, np.asarray(again[name]), rtol=0, atol=1e-6)
        return {name: tensor.astype(float) - family.tensors[0][name] for name, tensor in found.items()}

    return run


def deltas_of(family, name):
    return [tensors[name].astype(float) - family.tensors[0][name] for tensors in family.tensors[1:]]


def close(found, expected, atol=2e-6):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


# --- depth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([f"model.layers.{n}.w" for n in range(3)] + ["lm_head.w"], [0, 0.5, 1, None]),
        ([f"h.{n}.attn.c_attn.weight" for n in (0, 1, 11)], [0, 0.5, 1]),
        ([f"transformer.h.{n}.w" for n in range(12)], [n / 11 for n in range(12)]),
        ([f"Transformer/encoderblock_{n}/MlpBlock_0/kernel" for n in range(5)], [n / 4 for n in range(5)]),
        ([f"params/layers_{n}/w" for n in (0, 10, 9)], [0, 1, 0.5]),
        (["encoder.layer.0.w", "encoder.layer.2.w", "encoder.layer.1.w", "decoder.layer.0.w", "decoder.layer.1.w"],
         [0, 1, 0.5, 0, 1]),
        (["model.layers.0.w"], [0]),
        (["h.0.experts.0.w", "h.0.experts.7.w", "h.1.experts.3.w"], [0, 0, 1]),
        (["conv1.weight", "w", "position_ids"], [None, None, None]),
        (["layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.conv1.weight"], [0, 1, 0]),
    ],
)  # fmt: skip
def test_depths(names, expected):
    assert list(resolve.depths(names).values()) == expected


def test_gradient_over_depth(family, merged):
    found = merged(parameters={"scale": {"gradient": [1.0, 0.25]}})
    for name, scale in {LAYERS.format(0): 1.0, LAYERS.format(1): 0.25, "lm_head.weight": 1.0}.items():
        close(found[name], scale * np.sum(deltas_of(family, name), axis=0))


def test_depth_as_a_parameter(family, merged):
    found = merged("deeper(gain=2.0) >> average")
    for name, factor in {UP.format(0): 1, UP.format(1): 3, "model.norm.weight": 1}.items():
        close(found[name], factor * np.mean(deltas_of(family, name), axis=0))


# --- by name and by expert ----------------------------------------------------------------------------------------


def test_values_by_pattern(family, merged):
    scale = [{"match": "*mlp*", "value": {"gradient": [0.5, 1.0]}}, {"match": "*.q_proj.*", "value": 2.0}, {"value": 0}]
    found = merged(parameters={"scale": scale})
    for name, expected in {
        UP.format(0): 0.5, UP.format(1): 1.0, LAYERS.format(0): 2.0, LAYERS.format(1): 2.0, "model.norm.weight": 0.0
    }.items():  # fmt: skip
        close(found[name], expected * np.sum(deltas_of(family, name), axis=0))


@pytest.mark.parametrize("factor", [[1.0, 0.0, 3.0], {"experts": {"m3": 3.0, "m1": 1.0, "m2": 0.0}}])
def test_values_by_expert(family, merged, factor):
    found = merged(f"times(factor={factor}) >> average")
    for name in (LAYERS.format(1), "model.norm.weight"):
        a, _, c = deltas_of(family, name)
        close(found[name], (a + 3 * c) / 3)


def test_values_by_expert_of_a_method_that_sees_all_at_once(family, merged):
    found = merged("times(factor=[1.0, -1.0, 2.0]) >> middle(scale={'gradient': [1.0, 2.0]})")
    for number in (0, 1):
        a, b, c = deltas_of(family, UP.format(number))
        close(found[UP.format(number)], (1 + number) * np.median([a, -b, 2 * c], axis=0))


def test_weights_by_tensor(family, merged):
    weights = [{"gradient": [1.0, 3.0]}, 2.0, [{"match": "*mlp*", "value": 0.5}, {"value": 1.0}]]
    experts = [cfmerge.Expert(str(path), path.name, weight) for path, weight in
               zip(family.experts, weights, strict=True)]  # fmt: skip
    found = merged("average", experts=experts, weights=weights)
    for name, own in {
        LAYERS.format(0): (1, 2, 1), LAYERS.format(1): (3, 2, 1), UP.format(1): (3, 2, 0.5), "lm_head.weight": (1, 2, 1)
    }.items():  # fmt: skip
        close(found[name], np.average(deltas_of(family, name), axis=0, weights=own))


def test_rules_with_kinds_and_methods(family, merged):
    rules = [
        {"kinds": ["vector"], "method": "task_arithmetic", "parameters": {"scale": {"gradient": [2.0, 4.0]}}},
        {"match": "*mlp*", "kinds": ["matrix"], "method": "times(factor=[1, 0, 0]) >> task_arithmetic(scale=1)"},
        {"kinds": ["head", "embedding"], "method": "keep-base"},
    ]
    found = merged("middle", rules=rules)
    norm = "model.layers.1.input_layernorm.weight"
    close(found[norm], 4 * np.sum(deltas_of(family, norm), axis=0))
    close(found[UP.format(0)], deltas_of(family, UP.format(0))[0])
    close(found[LAYERS.format(0)], np.median(deltas_of(family, LAYERS.format(0)), axis=0))
    assert not found["lm_head.weight"].any()


def test_a_rule_changes_the_methods_own_parameters(family, merged):
    found = merged(
        parameters={"scale": {"gradient": [1.0, 2.0]}}, rules=[{"match": "*mlp*", "parameters": {"scale": 5}}]
    )
    close(found[UP.format(1)], 5 * np.sum(deltas_of(family, UP.format(1)), axis=0))
    close(found[LAYERS.format(1)], 2 * np.sum(deltas_of(family, LAYERS.format(1)), axis=0))


# --- recipes ------------------------------------------------------------------------------------------------------


def test_forms_in_a_recipe(family, tmp_path, load, contents):
    """And the card repeats them."""
    text = f"""
base: {family.base}
experts:
- {{path: {family.experts[0]}, weight: {{gradient: [1, 3]}}}}
- {{path: {family.experts[1]}, name: code, weight: [{{match: "*mlp*", value: 0.5}}, {{value: 1}}]}}
method: "times(factor={{'experts': {{'m1': 2, 'code': 1e0}}}}) >> average"
rules:
- kinds: [vector]
  method: task_arithmetic
  parameters:
    scale: [{{match: "*layers*", value: {{gradient: [0, 1]}}}}, {{value: '0.5'}}]
"""
    (tmp_path / "recipe.yaml").write_text(text)
    result = cfmerge.merge_recipe(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "out")
    found = load(result.output)
    name = UP.format(1)
    a, b, _ = deltas_of(family, name)
    close(found[name] - family.tensors[0][name], (3 * 2 * a + 0.5 * b) / 3.5)
    for name, scale in {"model.layers.0.input_layernorm.weight": 0, "model.norm.weight": 0.5}.items():
        a, b, _ = deltas_of(family, name)
        close(found[name] - family.tensors[0][name], scale * (a + b))
    again = cfmerge.merge_recipe(load_recipe(result.output / "README.md"), tmp_path / "again")
    assert contents(again.output) == contents(result.output)


def test_recipe_that_goes_through_yaml(family):
    recipe = cfmerge.make_plan(
        cfmerge.Recipe(
            str(family.base), [str(path) for path in family.experts], "task_arithmetic",
            {"scale": [{"match": "*mlp*", "value": {"gradient": [0, 1]}}, {"value": 1}]},
        )
    ).explicit_recipe  # fmt: skip
    assert yaml.safe_load(recipe.to_yaml())["parameters"] == recipe.parameters


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("times(factor=[1, 2]) >> average", ["times", "'factor'", "2 values for 3 experts"]),
        ("times(factor={'experts': {'m1': 1, 'm2': 1, 'm4': 1}}) >> average", ["no expert 'm4'", "m1, m2, m3"]),
        ("times(factor={'experts': {'m1': 1, 'm2': 1}}) >> average", ["'m3' has no value"]),
        ("task_arithmetic(scale=[{'match': '*mlp*', 'value': 1}])", ["no pattern matches it", "for tensor"]),
        ("trim(density=[0.5, 0.5, 7]) >> average", ["density", "[0, 1]", "7"]),
        ("trim(density={'gradient': [0.5, 7]}) >> average", ["density", "[0, 1]", "7"]),
    ],
)
def test_values_that_do_not_fit(family, refused, method, words):
    refused(words, family.base, family.experts, method)
    trees = dict(zip(["m1", "m2", "m3"], family.tensors[1:], strict=True))
    with pytest.raises(CfmergeError) as caught:
        cfmerge.merge_params(family.tensors[0], trees, methods.make(method))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("weight", [{"gradient": []}, {"gradients": [1]}, [1.0, 2.0], [{"match": "x", "value": 1}]])
def test_weights_that_do_not_fit(family, refused, weight):
    experts = [cfmerge.Expert(str(family.experts[0]), "one", weight), *map(str, family.experts[1:])]
    refused(["expert 'one'", "weight"], family.base, experts)


# --- one batch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["squares(ridge={})", "times(factor=[1, {}, 2]) >> middle"])
def test_tensors_with_different_numbers_share_a_batch(family, tmp_path, load, monkeypatch, method):
    """One stack of all q_proj, one compiled step, and the bytes of each merged by itself with its own number."""
    values = {"0": 0.25, "1": 0.75}
    text = method.format([{"match": f"*layers.{layer}.*", "value": value} for layer, value in values.items()]
                         + [{"value": 0.5}])  # fmt: skip
    seen = []
    original = cutting.units_of

    def noted(*arguments):
        for batch in original(*arguments):
            seen.append({job.name for job in batch.jobs})
            yield batch

    monkeypatch.setattr("cfmerge.engine.loop.units_of", noted)
    cfmerge.merge(family.base, family.experts, text, output=tmp_path / "all")
    assert any({LAYERS.format(0), LAYERS.format(1)} <= names for names in seen)
    found = load(tmp_path / "all")
    for layer, value in values.items():
        output = tmp_path / f"layer{layer}"
        cfmerge.merge(family.base, family.experts, method.format(value), output=output)
        alone = load(output)
        for name in (LAYERS, UP, "model.layers.{}.mlp.down_proj.weight"):
            assert np.array_equal(found[name.format(layer)], alone[name.format(layer)]), name


def test_steps_are_compiled_once_for_all_numbers(own):
    start = steps.compiled("oi", "float32").start

    def compiled_with(method):
        start(inputs.settings_of([method]), np.zeros((1, 4, 3), np.float32))
        return start._cache_size()

    first = compiled_with(own.squares(ridge=0.25))
    assert compiled_with(own.squares(ridge=0.5)) == first
    assert compiled_with(own.squares(ridge=0.25) >> methods.scale()) == first + 1


def test_traced_numbers_by_tensor(own):
    """Under jit, a gradient over depth made of traced stops."""
    generator = np.random.default_rng(0)
    base = {f"h.{n}.weight": np.zeros((3, 4), np.float32) for n in range(3)}
    experts = [{k: generator.standard_normal((3, 4)).astype(np.float32) for k in base} for _ in range(2)]

    def merge(value):
        scale = [{"match": "h.0.*", "value": 2 * value}, {"match": "h.1.*", "value": value}, {"value": 1.0}]
        return cfmerge.merge_params(base, experts, methods.task_arithmetic(scale))

    for name, scale in {"h.0.weight": 0.5, "h.1.weight": 0.25, "h.2.weight": 1.0}.items():
        close(jax.jit(merge)(0.25)[name], scale * (experts[0][name] + experts[1][name]))
    gradient = jax.grad(lambda value: merge(value)["h.0.weight"].sum())(0.25)
    close(gradient, 2 * (experts[0]["h.0.weight"] + experts[1]["h.0.weight"]).sum(), 1e-5)


def test_layers_that_are_stacked_in_one_tensor_are_told_of():
    """They cannot differ; where nothing differs, or the tensor has a place among the layers, nothing is said."""
    base = {"stack": {"kernel": np.zeros((3, 4, 5), np.float32)}, "h_0": {"kernel": np.zeros((2, 4, 5), np.float32)}}
    experts = [{name: {"kernel": np.ones_like(leaf["kernel"])} for name, leaf in base.items()}] * 2
    rules = [{"match": "*", "layout": "bio"}]
    graded = methods.task_arithmetic({"gradient": [1.0, 2.0]})
    for method, weights in ((graded, None), (methods.task_arithmetic(1.0), [1.0, {"gradient": [1.0, 2.0, 1.0]}])):
        with pytest.warns(UserWarning, match="^stack/kernel: layers stacked in one tensor"):
            found = cfmerge.merge_params(base, experts, method, weights=weights, rules=rules)
        close(found["stack"]["kernel"], np.full((3, 4, 5), 2.0))
    elsewhere = methods.task_arithmetic([{"match": "h_*", "value": {"gradient": [1.0, 2.0]}}, {"value": 1.0}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cfmerge.merge_params(base, experts, methods.task_arithmetic(1.0), rules=rules)
        cfmerge.merge_params(base, experts, elsewhere, rules=rules)
