"""The output's chat template: the base's unless the recipe says otherwise."""

import json

import numpy as np
import pytest

import cfmerge
from cfmerge import CfmergeError, Recipe

OWN, CONFIG = "chat_template.jinja", "tokenizer_config.json"


@pytest.fixture
def model(tmp_path, make_model):
    """`model(name, own, listed)`: a model with a chat template in a file of its own, or in the tokenizer's config."""

    def make(name, own=None, listed=None):
        number = sum(map(ord, name))
        values = np.random.default_rng(number).standard_normal((4, 3)).astype(np.float32)
        path = make_model(tmp_path / name, {"layer.weight": values})
        (path / CONFIG).write_text(json.dumps({"bos_token": "<s>", **({"chat_template": listed} if listed else {})}))
        if own:
            (path / OWN).write_text(own)
        return str(path)

    return make


def written(base, experts, tmp_path, asked, name="out"):
    """The side files of a merge that concern templates, and its notes."""
    result = cfmerge.merge_recipe(Recipe(base, experts, "average", chat_template=asked), tmp_path / name)
    config = json.loads((tmp_path / name / CONFIG).read_text())
    assert config["bos_token"] == "<s>"
    own = tmp_path / name / OWN
    return own.read_text() if own.exists() else None, config.get("chat_template"), result.notes


def test_the_bases_is_kept_and_another_replaces_it_wherever_it_lies(model, tmp_path):
    base, experts = model("base", own="{{ base }}"), [model("a"), model("b")]
    assert written(base, experts, tmp_path, None)[:2] == ("{{ base }}", None)
    assert written(base, experts, tmp_path, "{{ mine }}", "mine")[:2] == (None, "{{ mine }}")
    own, listed, _ = written(base, experts, tmp_path, "chatml", "chatml")
    assert own is None
    assert "<|im_start|>assistant" in listed


def test_auto_is_that_of_most_models(model, tmp_path):
    several = [{"name": "tools", "template": "{{ no }}"}, {"name": "default", "template": "{{ b }}"}]
    base = model("base", own="{{ base }}")
    experts = [model("a", listed="{{ b }}\n"), model("b", listed=several), model("c")]
    own, listed, notes = written(base, experts, tmp_path, "auto")
    assert (own, listed) == (None, "{{ b }}")
    assert "chat_template auto: 2 of 3 models with one have the output's" in notes
    bare = [model("d"), model("e"), model("f")]
    own, listed, notes = written(bare[0], bare[1:], tmp_path, "auto", "bare")
    assert (own, listed) == (None, None)
    assert any("no model has a chat template" in note for note in notes)


def test_what_is_no_template(model, tmp_path, make_model):
    def fails(words, asked, base):
        experts = [model("a" + asked[:1]), model("b" + asked[:1])]
        with pytest.raises(CfmergeError, match=words):
            cfmerge.make_plan(Recipe(base, experts, "average", chat_template=asked))

    fails("chat_template 'llama9': expected auto", "llama9", model("base"))
    bare = make_model(tmp_path / "bare", {"layer.weight": np.ones((4, 3), np.float32)})
    fails("the output has no tokenizer_config.json", "chatml", str(bare))
