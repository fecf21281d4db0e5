"""A configuration of mergekit that is wrong, or asks for what is not done, is refused by name, with the way out."""

import pytest
import yaml

from cfmerge import CfmergeError
from cfmerge.mergekit import is_file, load, translated

MODELS = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 1}}]
TIES = {"merge_method": "ties", "base_model": "base", "models": MODELS}


def sliced(*ranges, method="passthrough", **keys):
    sources = [{"sources": [{"model": m, "layer_range": r}]} for m, r in ranges]
    return {"merge_method": method, "slices": sources, **keys}


def weighted(**parameters):
    return {**TIES, "models": [{"model": "a", "parameters": parameters}]}


WRONG = {
    "an unknown method": (
        {**TIES, "merge_method": "dare-ties"},
        "unknown merge_method 'dare-ties'; did you mean 'dare_ties'",
    ),
    "an unknown key": ({**TIES, "basemodel": "x"}, "unknown key 'basemodel'; did you mean 'base_model'"),
    "a parameter at the top": (
        {**TIES, "normalize": True},
        "'normalize': it is a parameter; write it below `parameters:`",
    ),
    "a parameter beside the model": (
        {**TIES, "models": [{"model": "a", "weight": 1}]},
        "unknown key 'weight' at models[0]: it is a parameter",
    ),
    "a key in a slice": (
        {**sliced(("a", [0, 2])), "slices": [{"source": []}]},
        "unknown key 'source' at slices[0]; did you mean 'sources'",
    ),
    "an unknown parameter": (
        weighted(wieght=1),
        "models[0]: merge_method ties has no parameter 'wieght'; did you mean 'weight'",
    ),
    "a parameter of another method": ({**TIES, "parameters": {"t": 1}}, "ties has no parameter 't'"),
    "a shared one of a model": (weighted(weight=1, normalize=True), "'normalize' of ties is one for all models"),
    "a missing one": ({**TIES, "models": [{"model": "a"}]}, "x.yml, a: parameter 'weight' is missing"),
    "a number that is none": (weighted(weight="much"), "parameter 'weight': expected a number, found 'much'"),
    "a switch that is none": ({**TIES, "parameters": {"normalize": "yes"}}, "expected true or false, found 'yes'"),
    "a switch by filter": (
        {**TIES, "parameters": {"normalize": [{"filter": "mlp", "value": True}]}},
        "'normalize' differs from tensor to tensor",
    ),
    "a gradient of a switch": ({**TIES, "parameters": {"normalize": [True, False]}}, "is a gradient, which a bool"),
    "a condition": (weighted(weight=[{"filtre": "x", "value": 1}]), "is not {filter: TEXT, value: VALUE}"),
    "no base": ({"merge_method": "ties", "models": MODELS}, "merge_method ties needs a `base_model`"),
    "too many": (
        {**TIES, "merge_method": "slerp", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"t": 0.5}},
        "slerp takes 1 models beside the base model, found 2",
    ),
    "too few": (
        {**TIES, "merge_method": "model_stock", "models": [{"model": "a"}]},
        "at least 2 models beside the base",
    ),
    "a model twice": ({**TIES, "models": [*MODELS, MODELS[0]]}, "model a is listed twice"),
    "several to copy": (
        {"merge_method": "passthrough", "models": [{"model": "a"}, {"model": "b"}]},
        "copies one model, found 2",
    ),
    "neither": ({"merge_method": "ties", "base_model": "a"}, "expected one of `models` and `slices`, found neither"),
    "both": ({**TIES, **sliced(("a", [0, 2]), method="ties")}, "found models and slices"),
    "modules": ({"merge_method": "linear", "modules": {"text": {}}}, "`modules` is not taken"),
    "residual_weight": (
        {
            "merge_method": "passthrough",
            "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}], "residual_weight": 0.5}],
        },
        "`residual_weight` is not taken",
    ),
    "override_architecture": (
        {**TIES, "base_model": {"model": "a", "override_architecture": "X"}},
        "`override_architecture` is not taken: cfmerge needs no architecture",
    ),
    "an unknown key of a model": ({**TIES, "base_model": {"model": "a", "revision": "x"}}, "unknown key 'revision'"),
    "an adapter over the base": ({**TIES, "base_model": "base+lora"}, "a base cannot have an adapter"),
    "an adapter over a copy": (sliced(("a+lora", [0, 2])), "a+lora is the base of the merge, and a base cannot have"),
    "no layers": (sliced(("a", [3, 3])), "layer_range [3, 3] of a has no layers"),
    "a range of one": (sliced(("a", [3])), "layer_range"),
    "a base that is no source": (
        sliced(("a", [0, 2]), method="ties", base_model="base"),
        "slices[0]: base_model base is not among the sources",
    ),
    "a filter with a number in a stack": (
        sliced(("a", [0, 2]), ("a", [0, 2]), parameters={"scale": [{"filter": "layers.1.", "value": 0}]}),
        "a filter with a number in it, in a stack",
    ),
    "a dtype": ({**TIES, "dtype": "int8"}, "dtype 'int8'; the output can be float32, float16, bfloat16"),
    "an output in float64": ({**TIES, "dtype": "float64"}, "the output can be"),
    "tokens": ({**TIES, "tokenizer": {"source": "union", "tokens": {"<a>": {}}}}, "tokenizer.tokens is not taken"),
    "padding": ({**TIES, "tokenizer": {"source": "union", "pad_to_multiple_of": 8}}, "pad_to_multiple_of is not taken"),
    "a template by name": ({**TIES, "chat_template": "llama3"}, "chat_template llama3: only chatml is known by name"),
    "two tokenizers": ({**TIES, "tokenizer": {}, "tokenizer_source": "base"}, "say the same"),
    "a model that cannot be read": ({**TIES, "base_model": "a@b@c"}, "'a@b@c' cannot be read; write PATH[@REVISION]"),
}


@pytest.mark.parametrize("label", WRONG)
def test_wrong_configurations(label):
    content, words = WRONG[label]
    with pytest.raises(CfmergeError) as caught:
        translated(yaml.safe_dump(content), "x.yml")
    assert words in str(caught.value)
    assert "x.yml" in str(caught.value)


def test_wrong_chains():
    def fails(words, *contents):
        with pytest.raises(CfmergeError, match=words):
            translated("---\n".join(map(yaml.safe_dump, contents)), "x.yml")

    fails("all but the last need a `name` of their own", TIES, TIES)
    fails("all but the last need a `name` of their own", {**TIES, "name": "n"}, {**TIES, "name": "n"})
    fails("cannot be used as the name of a directory", {**TIES, "name": "a/b"}, TIES)
    fails("document 2: has no `merge_method`", {**TIES, "name": "n"}, {"base": "a"})
    fails("document 1: unknown key", {**TIES, "name": "n", "bace": 1}, TIES)
    one, other = {**TIES, "name": "n", "base_model": "m"}, {**TIES, "name": "m", "base_model": "n"}
    fails("'n', 'm' need each other's results", one, other, TIES)
    fails("is empty", None)


def test_what_has_no_effect_is_said():
    def notes(**keys):
        return translated(yaml.safe_dump({**TIES, **keys}), "x.yml")[0].notes

    assert notes() == ()
    assert notes(parameters={"int8_mask": True}) == ("int8_mask: no effect in ties, here as in mergekit",)
    assert notes(merge_method="task_arithmetic", parameters={"density": 0.5}) == (
        "density: no effect in task_arithmetic, here as in mergekit",
    )
    assert "arithmetic is in float32" in notes(dtype="bfloat16")[0]
    base = {"model": "base", "parameters": {"weight": 1}}
    assert notes(models=[base, *MODELS]) == ("parameters of the base model have no effect, here as in mergekit",)


def test_files_are_told_apart_by_merge_method(tmp_path):
    theirs, ours = tmp_path / "theirs.yml", tmp_path / "ours.yaml"
    theirs.write_text(yaml.safe_dump(TIES))
    ours.write_text("base: a\nexperts: [b, c]\n")
    assert is_file(theirs)
    assert not is_file(ours)
    assert not is_file(tmp_path / "none.yml")
    with pytest.raises(CfmergeError, match=r"none\.yml: cannot be read"):
        load(tmp_path / "none.yml")
    theirs.write_text("merge_method: [")
    with pytest.raises(CfmergeError, match="is not valid YAML"):
        load(theirs)
