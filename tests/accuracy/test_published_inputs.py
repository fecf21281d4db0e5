"""Published tables: models and files that are wrong are told, and nothing of the user's is lost."""

import json
import shutil

import numpy as np
import published_parts as parts
import pytest
from safetensors.numpy import load_file, save_file

from cfmerge.errors import CfmergeError
from cfmerge_accuracy.published import gpt2, run
from cfmerge_accuracy.published.gpt2 import Counted

EXPERT = "tanganke/gpt2_rte"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    parts.gpt2_models(root)
    parts.glue_sets(root, names=("rte",))
    return root


@pytest.fixture
def root(made, tmp_path):
    """A copy, to be spoilt."""
    return shutil.copytree(made, tmp_path / "in")


def asked(root, output, **more):
    return run.Options(root, output, suites=["gpt2"], tasks=["rte"], **{"lines": ["experts"], **more})


def changed(root, name, change):
    """Applies a change to the tensors of a model."""
    file = root / name / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def set_nan(tensors):
    tensors["transformer.h.0.mlp.c_fc.weight"][0, 0] = np.nan


def test_an_expert_that_is_not_finite_has_no_accuracy(root, tmp_path):
    changed(root, EXPERT, set_nan)
    with pytest.raises(CfmergeError, match=r"gpt2_rte: tensor 'transformer\.h\.0\.mlp\.c_fc\.weight' holds NaN"):
        run.run(asked(root, tmp_path / "out"), lambda line: None)
    assert run.kept(tmp_path / "out" / run.ROWS) == []


@pytest.mark.parametrize("case", ["missing", "shape", "truncated", "tokenizer", "tokenizer's config", "null"])
def test_what_is_wrong_is_told_before_anything_is_measured(case, root, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "evaluator_of", lambda *how: pytest.fail("measured"))
    if case == "missing":
        changed(root, EXPERT, lambda tensors: tensors.pop("transformer.h.0.mlp.c_fc.weight"))
        told = r"gpt2_rte: its tensors are not the base's: h\.0\.mlp\.c_fc\.weight is missing"
    elif case == "shape":
        changed(root, EXPERT, lambda tensors: tensors.update({"transformer.wpe.weight": np.zeros((2, 8), np.float32)}))
        told = r"gpt2_rte: .*wpe\.weight is \[2, 8\], the base's \[512, 8\]"
    elif case == "truncated":
        file = root / "gpt2/model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        told = r"gpt2.*model\.safetensors"
    elif case == "null":
        table = {"sentence1": ["a", None], "sentence2": ["b", "c"], "label": [0, 1]}
        parts.write_parquet(
            root / "glue/rte/validation-00000-of-00001.parquet", table, ("entailment", "not_entailment")
        )
        told = "example 1 of rte has a null"
    else:
        (root / "gpt2" / {"tokenizer": "tokenizer.json"}.get(case, "tokenizer_config.json")).write_text("{]")
        told = "gpt2: its tokenizer cannot be read.*fetch the whole repository again"
    with pytest.raises(CfmergeError, match="nothing was evaluated") as error:
        run.run(asked(root, tmp_path / "out", only_check=True, lines=["base", "experts"]), lambda line: None)
    assert error.match(told)
    assert not (tmp_path / "out").exists()


def test_a_config_that_does_not_fit_is_an_error(root):
    config = root / EXPERT / "config.json"
    for wrong in ({"n_head": 3}, {"vocab_size": 999}):
        config.write_text(json.dumps({**json.loads(config.read_text()), "n_head": 2, **wrong}))
        with pytest.raises(CfmergeError, match=r"gpt2_rte: its config\.json does not fit"):
            gpt2.classifier(gpt2.trunk_of(root / EXPERT), root / EXPERT, 256)


def test_another_config_or_tokenizer_is_measured_again(root, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(run.Texts, "count", lambda self, model, task: counted.append(1) or Counted(1, 2, 1.0))
    for number, file in enumerate((None, "tanganke/gpt2_rte/config.json", "gpt2/tokenizer_config.json", None), 1):
        if file:
            (root / file).write_text((root / file).read_text() + "\n")
        run.run(asked(root, tmp_path / "out"), lambda line: None)
        assert len(counted) == min(number, 3)


def test_what_a_killed_run_left_costs_no_number(root, tmp_path, monkeypatch):
    monkeypatch.setattr(run.Texts, "count", lambda self, model, task: Counted(1, 2, 1.0))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / run.ROWS).write_text('{"x": 1}\n[]\n{"suite": "gpt2", "line": "ba')
    (text,) = run.run(asked(root, tmp_path / "out"), lambda line: None)
    assert len(run.kept(tmp_path / "out" / run.ROWS)) == 1
    assert "50.0" in text


def test_a_page_of_the_user_is_kept(root, tmp_path):
    (tmp_path / "README.md").write_text("my notes")
    with pytest.raises(CfmergeError, match=r"README\.md: is not a page of these tables"):
        run.run(asked(root, tmp_path), lambda line: None)
    assert (tmp_path / "README.md").read_text() == "my notes"
    with pytest.raises(CfmergeError, match="cannot be a directory"):
        run.run(asked(root, tmp_path / "README.md"), lambda line: None)
    with pytest.raises(CfmergeError, match="cannot be a directory"):
        run.run(asked(root, tmp_path / "README.md/out"), lambda line: None)


def test_a_run_that_is_refused_leaves_no_directory(root, tmp_path):
    changed(root, EXPERT, lambda tensors: tensors.pop("transformer.h.0.mlp.c_fc.weight"))
    with pytest.raises(CfmergeError, match="nothing was evaluated"):
        run.run(asked(root, tmp_path / "out"), lambda line: None)
    assert not (tmp_path / "out").exists()
