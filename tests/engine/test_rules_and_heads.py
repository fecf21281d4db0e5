"""Rules per tensor, heads that models do not share, prefixes, ties, and tensors that nobody expects."""

import numpy as np
import pytest

import cfmerge
from cfmerge import Rule, methods
from cfmerge.errors import CfmergeError

Q = "model.layers.0.self_attn.q_proj.weight"
Q1 = "model.layers.1.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@pytest.fixture
def merged(family, tmp_path, load):
    """`merged(rules, method)`: the tensors of the family's merge."""

    def run(rules, method="average", **options):
        result = cfmerge.merge(family.base, family.experts, method, rules=rules, output=tmp_path / "out", **options)
        return load(result.output), result.plan

    return run


def mean(family, name):
    return sum(tensors[name].astype(float) for tensors in family.tensors[1:]) / 3


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


# --- rules --------------------------------------------------------------------------------------------------------


def test_first_match_wins(family, merged):
    rules = [Rule(Q, "keep-base"), Rule("*.q_proj.*", "task_arithmetic", {"scale": 1.0})]
    found, plan = merged(rules)
    assert np.array_equal(found[Q], family.tensors[0][Q])
    base = family.tensors[0][Q1].astype(float)
    close(found[Q1], base + 3 * (mean(family, Q1) - base))
    close(found[UP], mean(family, UP))
    labels = {job.name: job.assignment.label for job in plan.jobs}
    assert (labels[Q], labels[Q1], labels[UP]) == ("keep-base", "task_arithmetic", "average")


def test_skip_leaves_a_tensor_out(family, merged):
    found, _ = merged([Rule("*.mlp.*", "skip")])
    assert set(found) == {name for name in family.tensors[0] if ".mlp." not in name}


def test_parameters_override(family, merged):
    """A rule with parameters alone changes the merge's own method."""
    found, _ = merged([Rule(Q, parameters={"scale": 2.0})], "task_arithmetic", parameters={"scale": 0.5})
    for name, scale in ((Q, 2.0), (Q1, 0.5)):
        base = family.tensors[0][name].astype(float)
        close(found[name], base + 3 * scale * (mean(family, name) - base))


def test_another_method_by_pattern(family, merged):
    """Matrices by ACE, the embedding by task arithmetic, the rest by the mean."""
    rules = [Rule(EMBED, "task_arithmetic", {"scale": 0.1}), Rule("*.[ud]*_proj.weight", "average")]
    found, plan = merged(rules, "ace")
    base = family.tensors[0][EMBED].astype(float)
    close(found[EMBED], base + 0.3 * (mean(family, EMBED) - base))
    close(found[UP], mean(family, UP))
    assert plan.counts()["matrix", "ace"] == 2
    assert np.abs(found[Q] - mean(family, Q)).max() > 1e-4


def test_layout_override(make_model, tmp_path, load):
    """The same weight stored transposed, and said to be so, gives the transposed merge."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((16, 8)).astype(np.float32) for _ in range(3)]
    straight = [make_model(tmp_path / f"s{n}", {"a.weight": w}, None) for n, w in enumerate(weights)]
    turned = [make_model(tmp_path / f"t{n}", {"a.weight": w.T.copy()}, None) for n, w in enumerate(weights)]
    cfmerge.merge(straight[0], straight[1:], output=tmp_path / "s")
    result = cfmerge.merge(turned[0], turned[1:], output=tmp_path / "t", rules=[Rule("a.weight", layout="io")])
    close(load(tmp_path / "t")["a.weight"].T, load(tmp_path / "s")["a.weight"])
    assert result.plan.jobs[0].parameter.layout == "io"


def test_kind_and_layout_override(make_model, tmp_path, llama, load):
    """A tensor with a name that says nothing is averaged, unless a rule gives kind and layout."""
    models = [
        make_model(tmp_path / f"m{n}", {"strange": tensors[Q], "norm.weight": tensors["model.norm.weight"]})
        for n, tensors in enumerate(map(llama, range(3)))
    ]
    plain = cfmerge.merge(models[0], models[1:], output=tmp_path / "plain")
    ruled = cfmerge.merge(
        models[0], models[1:], output=tmp_path / "ruled", rules=[Rule("strange", kind="matrix", layout="oi")]
    )
    assert plain.plan.counts() == {("vector", "average"): 2}
    assert ruled.plan.counts() == {("vector", "average"): 1, ("matrix", "ace"): 1}
    expected = cfmerge.merge_tensor(llama(0)[Q], [llama(1)[Q], llama(2)[Q]], methods.ace())
    close(load(tmp_path / "ruled")["strange"], expected)
    close(load(tmp_path / "plain")["strange"], (llama(1)[Q].astype(float) + llama(2)[Q]) / 2)


@pytest.mark.parametrize("layout", ["o", "oo", "ii", "oix", "io2", "oib"])
def test_bad_layout(family, refused, layout):
    words = [repr(Q), "(8, 8)", repr(layout), "one letter per axis"]
    refused(words, family.base, family.experts, "ace", rules=[Rule(Q, layout=layout)])


def test_method_that_needs_a_layout(make_model, tmp_path, llama, refused):
    models = [make_model(tmp_path / f"m{n}", {"strange": llama(n)[Q]}) for n in range(3)]
    refused(["'strange'", "(8, 8)", "layout: oi"], models[0], models[1:], rules=[Rule("strange", "ace")])


def test_rules_as_mappings(family, merged):
    found, _ = merged([{"match": Q, "method": "keep-base"}])
    assert np.array_equal(found[Q], family.tensors[0][Q])


# --- tensors that nobody expects ----------------------------------------------------------------------------------


def test_tensors_that_no_architecture_names_are_merged(make_model, tmp_path, llama, load):
    """mergekit drops what its architecture file does not list."""

    def model(number):
        extra = {
            "model.extra_adapter.table": np.full((3, 5), number, np.float32),
            "value_head.summary.weight": np.full((1, 8), number, np.float32),
            "rotary_emb.gain": np.full(4, number, np.float32),
        }
        return make_model(tmp_path / f"m{number}", llama(number) | extra)

    models = [model(number) for number in range(3)]
    cfmerge.merge(models[0], models[1:], output=tmp_path / "out")
    found = load(tmp_path / "out")
    assert set(found) == set(load(models[0]))
    for name in ("model.extra_adapter.table", "value_head.summary.weight", "rotary_emb.gain"):
        assert (found[name] == 1.5).all(), name


def test_every_tensor_of_the_base_is_merged_or_said_to_be_kept(family, merged):
    """No tensor is left at the base in silence: every one differs from it."""
    for method in ("average", "ace"):
        found, plan = merged([], method, overwrite=True)
        assert set(found) == set(family.tensors[0])
        assert all(not np.array_equal(found[name], tensor) for name, tensor in family.tensors[0].items())
        assert {job.assignment.action for job in plan.jobs} == {"merge"}


# --- heads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def headed(make_model, tmp_path, llama):
    """A base with a classifier of two classes, experts with two, three and another head."""

    def model(name, number, heads):
        tensors = {key: tensor for key, tensor in llama(number).items() if key != HEAD}
        return make_model(tmp_path / "in" / name, tensors | heads)

    def head(name, classes, value):
        return {f"{name}.weight": np.full((classes, 8), value, np.float32)}

    return [
        model("base", 0, head("classifier", 2, 0)),
        model("two", 1, head("classifier", 2, 1)),
        model("three", 2, head("classifier", 3, 2)),
        model("other", 3, head("score", 4, 3) | head("classifier", 2, 3)),
    ]


def test_heads_without_a_choice(headed, refused):
    """One error lists all of them, and the choices."""
    message = refused(
        ["three: classifier.weight (3, 8), in the base (2, 8)", "other: score.weight (4, 8) is not in the base",
         "--heads keep-base", "drop", "export"],
        headed[0], headed[1:],
    )  # fmt: skip
    assert "two:" not in message
    assert "--rule" not in message, "heads are told once, with the choice"


def test_heads_that_an_expert_lacks(headed, refused, make_model, tmp_path, llama):
    trunk = make_model(tmp_path / "trunk", {key: tensor for key, tensor in llama(4).items() if key != HEAD})
    words = ["base: classifier.weight (2, 8) is not in expert 'trunk'", "--heads"]
    refused(words, headed[0], [headed[1], trunk])


def test_heads_keep_base(headed, tmp_path, load, llama):
    cfmerge.merge(headed[0], headed[1:], "average", heads="keep-base", output=tmp_path / "out")
    found = load(tmp_path / "out")
    assert set(found) == set(load(headed[0]))
    assert (found["classifier.weight"] == 0).all()
    close(found[Q], sum(llama(n)[Q].astype(float) for n in (1, 2, 3)) / 3)


def test_heads_drop(headed, tmp_path, load):
    cfmerge.merge(headed[0], headed[1:], "average", heads="drop", output=tmp_path / "out")
    assert set(load(tmp_path / "out")) == set(load(headed[0])) - {"classifier.weight"}
    assert not (tmp_path / "out/heads").exists()


def test_heads_export(headed, tmp_path, load):
    result = cfmerge.merge(headed[0], headed[1:], "average", heads="export", output=tmp_path / "out")
    assert set(load(result.output)) == set(load(headed[0]))
    assert {path.name for path in (result.output / "heads").iterdir()} == {
        "two.safetensors", "three.safetensors", "other.safetensors"
    }  # fmt: skip
    from safetensors.numpy import load_file

    for number, name in enumerate(("two", "three", "other"), 1):
        heads = load_file(result.output / f"heads/{name}.safetensors")
        expected = {key: t for key, t in load(headed[number]).items() if "classifier" in key or "score" in key}
        assert set(heads) == set(expected)
        assert all(np.array_equal(heads[key], expected[key]) for key in heads)


POOLER = {"pooler.dense.weight": np.ones((8, 8), np.float32)}


@pytest.mark.parametrize("owner", ["base", "experts"])
def test_a_pooler_that_not_all_have_is_a_head(make_model, tmp_path, llama, refused, load, owner):
    """As between BertForMaskedLM, which has none, and BertForSequenceClassification."""
    extra = [POOLER if (owner == "base") == (n == 0) else {} for n in range(3)]
    models = [make_model(tmp_path / "in" / f"m{n}", llama(n) | extra[n]) for n in range(3)]
    refused(["pooler.dense.weight (8, 8)", "--heads keep-base"], models[0], models[1:])
    merged = cfmerge.merge(models[0], models[1:], "average", heads="export", output=tmp_path / "out").output
    assert set(load(merged)) == set(load(models[0]))
    assert (merged / "heads").exists() == (owner == "experts")


def test_a_pooler_that_all_have_is_merged(make_model, tmp_path, llama, load):
    models = [
        make_model(tmp_path / "in" / f"m{n}", llama(n) | {key: n * value for key, value in POOLER.items()})
        for n in range(3)
    ]
    cfmerge.merge(models[0], models[1:], "average", output=tmp_path / "out")
    assert (load(tmp_path / "out")["pooler.dense.weight"] == 1.5).all()


def test_what_only_an_expert_has_is_skipped_by_rule(make_model, tmp_path, llama, refused, load):
    extra = {"adapter.scale": np.ones(3, np.float32)}
    models = [make_model(tmp_path / "in" / f"m{n}", llama(n) | (extra if n == 2 else {})) for n in range(3)]
    refused(["has a tensor that the base lacks: 'adapter.scale' (3,)", "method skip"], models[0], models[1:])
    rules = [{"match": "adapter.*", "method": "skip"}]
    result = cfmerge.merge(models[0], models[1:], "average", rules=rules, output=tmp_path / "out")
    assert set(load(result.output)) == set(load(models[0]))
    assert any("adapter.scale" in note for note in result.notes)


def test_heads_that_all_share_are_merged(family, make_model, tmp_path, load, llama):
    models = [
        make_model(tmp_path / f"h{n}", llama(n) | {"classifier.weight": np.full((2, 8), n, np.float32)})
        for n in range(3)
    ]
    cfmerge.merge(models[0], models[1:], "average", output=tmp_path / "out")
    assert (load(tmp_path / "out")["classifier.weight"] == 1.5).all()


def test_a_rule_settles_a_head(headed, tmp_path, load):
    """What a rule says of a head needs no choice."""
    cfmerge.merge(headed[0], headed[1:3], "average", rules=[Rule("classifier.*", "keep-base")], output=tmp_path / "out")
    assert (load(tmp_path / "out")["classifier.weight"] == 0).all()


# --- prefixes -----------------------------------------------------------------------------------------------------


def bert(number, prefix="", head=None):
    rng, own = np.random.default_rng(0), np.random.default_rng(number)
    shapes = {
        "embeddings.word_embeddings.weight": (12, 8), "encoder.layer.0.attention.self.query.weight": (8, 8),
        "encoder.layer.0.attention.self.query.bias": (8,), "pooler.dense.weight": (8, 8),
    }  # fmt: skip
    scale = 0.02 if number else 0.0
    tensors = {
        prefix + name: (rng.standard_normal(shape) + scale * own.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    return tensors | ({"classifier.weight": np.full((head, 8), number, np.float32)} if head else {})


BERT = {"model_type": "bert", "tie_word_embeddings": True}


def test_prefix_of_the_experts(make_model, tmp_path, load):
    """A bare base (BertModel) and experts with a head (BertForSequenceClassification)."""
    base = make_model(tmp_path / "base", bert(0), BERT)
    experts = [make_model(tmp_path / f"e{n}", bert(n, "bert.", 1 + n), BERT) for n in (1, 2)]
    with pytest.raises(CfmergeError, match=r"(?s)e1: classifier.weight \(2, 8\).*e2: classifier.weight \(3, 8\)"):
        cfmerge.merge(base, experts, "average", output=tmp_path / "out")
    result = cfmerge.merge(base, experts, "average", heads="export", output=tmp_path / "out")
    assert any("'bert.' in front" in note for note in result.notes)
    found = load(result.output)
    assert set(found) == set(bert(0))
    for name, tensor in found.items():
        close(tensor, (bert(1)[name].astype(float) + bert(2)[name]) / 2)
    assert set(load(result.output / "heads")) == {"classifier.weight"}


def test_prefix_of_the_base(make_model, tmp_path, load):
    """The other way round; one expert has the prefix and one has not."""
    base = make_model(tmp_path / "base", bert(0, "bert.", 2), BERT)
    experts = [make_model(tmp_path / "bare", bert(1), BERT), make_model(tmp_path / "full", bert(2, "bert.", 2), BERT)]
    cfmerge.merge(base, experts, "average", heads="keep-base", output=tmp_path / "out")
    found = load(tmp_path / "out")
    assert set(found) == set(bert(0, "bert.", 2))
    for name in bert(0):
        close(found["bert." + name], (bert(1)[name].astype(float) + bert(2)[name]) / 2)


def test_prefix_and_a_missing_tensor(make_model, tmp_path, refused):
    base = make_model(tmp_path / "base", bert(0), BERT)
    tensors = bert(1, "bert.")
    del tensors["bert.pooler.dense.weight"]
    experts = [make_model(tmp_path / "e1", tensors, BERT), make_model(tmp_path / "e2", bert(2, "bert."), BERT)]
    refused(["'e1'", "'pooler.dense.weight'"], base, experts)


# --- ties ---------------------------------------------------------------------------------------------------------


def tied(llama, number, head):
    """A tied model that stores its embedding alone, or twice."""
    tensors = llama(number)
    del tensors[HEAD]
    return tensors | ({HEAD: tensors[EMBED].copy()} if head else {})


@pytest.mark.parametrize("base_stores", [False, True])
@pytest.mark.parametrize("config", [True, False], ids=["directory", "bare file"])
def test_tied_head_in_the_expert_only(make_model, tmp_path, llama, llama_config, load, base_stores, config):
    """Stored once or twice, it is one tensor, and equal in the output wherever the base stores it."""
    told = llama_config | {"tie_word_embeddings": True}
    base = make_model(tmp_path / "base", tied(llama, 0, base_stores), told)
    experts = [make_model(tmp_path / f"e{n}", tied(llama, n, n == 1), told if config else None) for n in (1, 2)]
    if not config:
        experts = [expert / "model.safetensors" for expert in experts]
        experts = {"one": experts[0], "two": experts[1]}
    cfmerge.merge(base, experts, "average", output=tmp_path / "out")
    found = load(tmp_path / "out")
    assert set(found) == set(tied(llama, 0, base_stores))
    close(found[EMBED], (llama(1)[EMBED].astype(float) + llama(2)[EMBED]) / 2)
    if base_stores:
        assert np.array_equal(found[HEAD], found[EMBED])


def test_untied_head_in_a_bare_file(make_model, tmp_path, llama, llama_config, refused):
    """A file without config.json that holds another head than the embedding."""
    base = make_model(tmp_path / "base", tied(llama, 0, False), llama_config | {"tie_word_embeddings": True})
    files = [make_model(tmp_path / f"e{n}", llama(n), None) / "model.safetensors" for n in (1, 2)]
    refused([repr(HEAD), repr(EMBED), "tied"], base, {"one": files[0], "two": files[1]})


def test_tied_expert_of_an_untied_base(make_model, tmp_path, llama, llama_config, load):
    """The base stores a head, the expert says that its own is its embedding."""
    base = make_model(tmp_path / "base", llama())
    told = llama_config | {"tie_word_embeddings": True}
    experts = [make_model(tmp_path / "e1", tied(llama, 1, False), told), make_model(tmp_path / "e2", llama(2))]
    cfmerge.merge(base, experts, "average", output=tmp_path / "out")
    close(load(tmp_path / "out")[HEAD], (llama(1)[EMBED].astype(float) + llama(2)[HEAD]) / 2)


def test_dropping_a_tied_tensor_drops_both(make_model, tmp_path, llama, llama_config, load):
    told = llama_config | {"tie_word_embeddings": True}
    models = [make_model(tmp_path / f"m{n}", tied(llama, n, True), told) for n in range(3)]
    cfmerge.merge(models[0], models[1:], "average", rules=[Rule(EMBED, "skip")], output=tmp_path / "out")
    assert not {HEAD, EMBED} & set(load(tmp_path / "out"))
