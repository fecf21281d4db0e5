"""What is written on the command line becomes the recipe that a file would say."""

import shlex

import msgspec
import pytest
import yaml

from cfmerge.cli.texts import make_recipe, rename, rule, split, swept
from cfmerge.errors import CfmergeError
from cfmerge.models.patterns import escape
from cfmerge.recipe import Expert, Recipe, Rule, parse_rule, rule_option

GIVEN = {"base": "base", "experts": ["a", "b"]}

RULES = {
    "match=*.q_proj.*, method=keep-base": {"match": "*.q_proj.*", "method": "keep-base"},
    "match=*,method=ties,parameters.density=0.2,parameters.k=1": {
        "match": "*", "method": "ties", "parameters": {"density": "0.2", "k": "1"},
    },
    "match='a, b', layout=oi": {"match": "a, b", "layout": "oi"},
    'match="it\'s", kind=matrix': {"match": "it's", "kind": "matrix"},
    "match=w[0,1].x, method=average": {"match": "w[0,1].x", "method": "average"},
    "match=a=b, method=trim(density=0.2, scope='model') >> disjoint_mean": {
        "match": "a=b", "method": "trim(density=0.2, scope='model') >> disjoint_mean",
    },
    "kinds=matrix+convolution, method=tsv_m": {"kinds": ["matrix", "convolution"], "method": "tsv_m"},
    "kinds=[matrix, convolution], method=tsv_m": {"kinds": ["matrix", "convolution"], "method": "tsv_m"},
    "match=*, parameters.scale={gradient: [0.1, 0.5]}": {
        "match": "*", "parameters": {"scale": {"gradient": [0.1, 0.5]}},
    },
    "{match: '*.x, y', method: average}": {"match": "*.x, y", "method": "average"},
    '{"match": "*", "method": "average", "kinds": ["matrix"]}': {
        "match": "*", "method": "average", "kinds": ["matrix"],
    },
    '- {match: "*", method: skip}': {"match": "*", "method": "skip"},
    'match: "lm_head.weight", method: keep-base': {"match": "lm_head.weight", "method": "keep-base"},
    '- match: "*.w"\n  layout: oi': {"match": "*.w", "layout": "oi"},
}  # fmt: skip


@pytest.mark.parametrize("text", RULES)
def test_a_rule(text):
    assert rule(text) == RULES[text]


WRONG = {
    "match=*, metod=average": "unknown key 'metod'; did you mean 'method'",
    "*.q_proj.*": "'*.q_proj.*' is not KEY=VALUE",
    "match=a, b, method=average": "'b' is not KEY=VALUE",
    "match='a, method=average": '"\'" is missing',
    "match=w[0, method=average": "']' is missing",
    "method=average": "`match`",
    "match=*, kind=matrx": "matrx",
    "{match: *.w, method: average}": "with quotes around globs",
    "match=*, parameters.scale={gradient: [}]": "is missing",
    "match=*, parameters.=3": "parameters.KEY=VALUE",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_rule(text):
    with pytest.raises(CfmergeError) as error:
        rule(text)
    assert WRONG[text] in str(error.value)


def test_every_field_of_a_rule_has_a_spelling():
    values = {"match": "x", "method": "average", "kind": "matrix", "layout": "oi", "kinds": "matrix"}
    text = ", ".join(f"{key}={value}" for key, value in values.items()) + ", parameters.scale=2"
    assert {*values, "parameters"} == set(Rule.__struct_fields__) == set(rule(text))


def test_parts_between_commas():
    assert split("a=1, b='x, y' ,c=f(1, [2, 3]),") == ["a=1", "b='x, y'", "c=f(1, [2, 3])"]
    assert split("match=l'x, method=m") == ["match=l'x", "method=m"]


def test_rules_of_the_command_line_stand_in_front(tmp_path):
    """The first that matches wins, so these win; nothing of the file's is lost."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**GIVEN, "rules": [{"match": "*", "method": "average"}]}))
    made = make_recipe(file, {"rules": ["match=*.w, method=skip", "kinds=vector, method=keep-base"]})
    assert [(one.match, one.method) for one in made.rules] == [("*.w", "skip"), ("", "keep-base"), ("*", "average")]
    assert made.rules[1].kinds == ["vector"]


def test_an_expert_as_a_mapping(tmp_path):
    text = "{path: a, name: first, weight: {gradient: [0, 1]}, moments: a.safetensors}"
    made = make_recipe(None, {"base": "base", "experts": [text, '{"path": "b", "weight": 2}', "c=d@0.5"]})
    assert made.experts == [
        Expert("a", "first", {"gradient": [0, 1]}, "a.safetensors"), Expert("b", "", 2.0), Expert("d", "c", 0.5),
    ]  # fmt: skip


def test_a_mapping_longer_than_any_path():
    text = "{path: a, weight: [" + ", ".join(f"{{match: '*.{n}.*', value: {n}}}" for n in range(400)) + "]}"
    assert len(make_recipe(None, {"base": "base", "experts": [text, "b"]}).experts[0].weight) == 400


def test_every_field_of_an_expert_has_a_spelling():
    """A mapping takes the keys that a file takes."""
    made = make_recipe(None, {"base": "base", "experts": ["{path: a, name: x, weight: 2, moments: m}"]})
    assert {"path", "name", "weight", "moments"} <= set(Expert.__struct_fields__)
    assert msgspec.to_builtins(made.experts[0]) == {"path": "a", "name": "x", "weight": 2.0, "moments": "m"}


def test_a_wrong_expert():
    with pytest.raises(CfmergeError, match=r"unknown key 'wieght'.*did you mean 'weight'"):
        make_recipe(None, {"base": "base", "experts": ["{path: a, wieght: 2}", "b"]})
    with pytest.raises(CfmergeError, match=r"--expert '{path:a}': cannot be read"):
        make_recipe(None, {"base": "base", "experts": ["{path:a}", "b"]})


def test_a_rename():
    assert rename(r"^model\.(.*) => language_model.\1") == {"from": r"^model\.(.*)", "to": r"language_model.\1"}
    assert rename("^vision_model[.] =>") == {"from": "^vision_model[.]", "to": ""}
    assert rename("{from: '^a', to: b}") == {"from": "^a", "to": "b"}
    for text in ("a", "=> b", "a -> b"):
        with pytest.raises(CfmergeError, match="write 'REGEX => TEXT'"):
            rename(text)


def test_parameters_are_lists_and_mappings_too():
    made = make_recipe(
        None, {**GIVEN, "parameters": ["scale={gradient: [0.1, 0.5]}", "density=[0.2, 0.5]", "eps=1e-5"]}
    )
    assert made.parameters == {"scale": {"gradient": [0.1, 0.5]}, "density": [0.2, 0.5], "eps": "1e-5"}


def test_other_lists_replace_those_of_the_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**GIVEN, "allow": ["one-expert"], "seed": 3}))
    made = make_recipe(file, {"experts": ["c"], "allow": ["duplicate-experts"], "seed": None, "rules": None})
    assert (made.experts, made.allow, made.seed) == ([Expert("c")], ["duplicate-experts"], 3)


ASKED = Recipe("base", ["a", "b"], "task_arithmetic", {"scale": 0.5, "normalise": True})


def test_a_grid_is_of_the_recipes_method():
    """With its other parameters; not of `ace`."""
    made = swept(ASKED, [], ["scale=0.1,0.2"], {})
    assert list(made) == ["task_arithmetic(scale=0.1)", "task_arithmetic(scale=0.2)"]
    assert all("normalise=True" in recipe.method for recipe in made.values())
    other = swept(ASKED, ["ties"], ["density=0.1,0.2"], {"scale": "3"})
    assert all("normalise" not in recipe.method and "3" in recipe.method for recipe in other.values())


def test_parameters_go_to_each_method_of_a_sweep():
    made = swept(ASKED, ["task_arithmetic", "x=ties"], [], {"scale": "3"})
    assert {label: (one.method, one.parameters) for label, one in made.items()} == {
        "task_arithmetic": ("task_arithmetic", {"scale": "3"}), "x": ("ties", {"scale": "3"}),
    }  # fmt: skip


ODD = ["a.b", "a b.weight", "w[0].weight", "a,b", "it's", 'say "x"', "both'\".w", "$HOME.`x`.w", "a(b", "x]",
       "größe.重み", " w", "tab\tname", "a=b", "{x}", "back\\slash", "wow!"]  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_rule_that_is_printed_can_be_pasted(name):
    option, text = shlex.split(rule_option(escape(name), "keep-base"))
    assert option == "--rule"
    assert parse_rule(rule(text)) == Rule(match=escape(name), method="keep-base")
