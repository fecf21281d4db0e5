"""Reports of merged models and of recipes: what is measured, and what is told where inputs are gone or changed."""

import hashlib
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import cfmerge
from cfmerge.errors import CfmergeError
from cfmerge.products import report, report_files
from cfmerge.report.card import inputs
from cfmerge.report.page.merge import Input


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_model, llama):
    folder = tmp_path_factory.mktemp("reports")
    for number, name in enumerate(("base", "math", "code")):
        make_model(folder / name, llama(number))
    experts = [cfmerge.Expert(str(folder / "math"), weight=2.0), cfmerge.Expert(str(folder / "code"))]
    cfmerge.merge(folder / "base", experts, "average", output=folder / "merged")
    return folder


@pytest.fixture
def copied(models, tmp_path):
    """The models elsewhere, with a card that finds them there."""
    folder = shutil.copytree(models, tmp_path / "models")
    card = folder / "merged/README.md"
    card.write_text(card.read_text().replace(str(models), str(folder)))
    return folder


def seen(monkeypatch, asked, **how):
    """The report, and all that its page was made of."""
    kept = []
    monkeypatch.setattr(report, "html", lambda page: "a page")
    monkeypatch.setattr(report, "page", lambda told: kept.append(told))
    return cfmerge.make_report(asked, **how), kept[0]


@pytest.mark.long
def test_a_merged_model_is_measured_beside_its_experts(models, monkeypatch):
    """What is kept is `<M, D_t> / ||D_t||^2` of the files; findings and growth are of the experts alone."""
    from safetensors.numpy import load_file

    made, told = seen(monkeypatch, models / "merged")
    assert made.lacking == ()
    assert told.experts == ["math", "code"]
    name = "model.layers.1.mlp.up_proj.weight"
    base, math, code, merged = (
        load_file(models / each / "model.safetensors")[name] for each in ("base", "math", "code", "merged")
    )
    np.testing.assert_allclose(merged - base, (2 * (math - base) + (code - base)) / 3, atol=1e-6)
    gram = told.measured[name].gram
    np.testing.assert_allclose(gram[2, 0], np.sum((merged - base) * (math - base)), rtol=1e-4)
    np.testing.assert_allclose(told.measured[name].spectra[2], np.linalg.svd(merged - base)[1], rtol=1e-3)
    experts = [cfmerge.Expert(str(models / "math"), weight=2.0), cfmerge.Expert(str(models / "code"))]
    alone = cfmerge.diagnose(models / "base", experts)
    assert told.diagnosis.experts == alone.experts == ("math", "code")
    assert [one.kind for one in told.diagnosis.findings] == [one.kind for one in alone.findings]
    assert told.diagnosis.recommendation == alone.recommendation
    assert told.diagnosis.tensors[name].growth == pytest.approx(alone.tensors[name].growth, rel=1e-3)
    assert {one.state for one in told.inputs} == {"unchanged"}
    assert sum(count for *_, count in told.counts) == len(told.tensors) == 11


def test_the_recipe_on_the_page_repeats_the_merge(models, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "_with_merged", lambda *asked: ([], None, None))  # measured above
    _, told = seen(monkeypatch, models / "merged/README.md")
    (tmp_path / "recipe.yaml").write_text(told.recipe)
    recipe = cfmerge.recipe.load(tmp_path / "recipe.yaml")
    assert recipe == cfmerge.recipe.load(models / "merged/README.md")
    assert "method: average" in told.recipe


def test_a_recipe_is_planned_and_diagnosed(models, monkeypatch):
    recipe = cfmerge.Recipe(str(models / "base"), [str(models / "math"), str(models / "code")], "ties")
    made, told = seen(monkeypatch, recipe, name="mine")
    assert (told.name, told.done, told.measured, made.lacking) == ("mine", False, None, ())
    assert told.diagnosis.experts == ("math", "code")
    assert [one.role for one in told.inputs] == ["base", "math", "code"]
    assert {one.what for one in told.tensors} >= {"ties"}


def test_an_input_with_other_content_is_told_and_not_measured(copied, monkeypatch, make_model, llama):
    shutil.rmtree(copied / "code")
    make_model(copied / "code", llama(7))
    made, told = seen(monkeypatch, copied / "merged")
    assert {one.role: one.state for one in told.inputs} == {
        "base": "unchanged", "math": "unchanged", "code": "other content",
    }  # fmt: skip
    assert "code: model.safetensors" in made.lacking[0]
    assert told.diagnosis is told.measured is None
    assert len(told.tensors) == 11


@pytest.mark.parametrize("names", [("base", "merged model"), ("a|b", "x")])
def test_experts_of_any_name(tmp_path, monkeypatch, make_model, llama, names):
    """Named as the base, as the merged model on the page, or with what separates the card's columns."""
    for number in range(3):
        make_model(tmp_path / str(number), llama(number))
    experts = [cfmerge.Expert(str(tmp_path / str(n)), name=name) for n, name in enumerate(names, 1)]
    cfmerge.merge(tmp_path / "0", experts, "average", output=tmp_path / "merged")
    made, told = seen(monkeypatch, tmp_path / "merged")
    assert made.lacking == ()
    assert [one.role for one in told.inputs] == ["base", *names]
    assert {one.state for one in told.inputs} == {"unchanged"}
    assert told.diagnosis.experts == names
    shutil.rmtree(tmp_path / "2")
    make_model(tmp_path / "2", llama(7))
    made, told = seen(monkeypatch, tmp_path / "merged")
    assert [one.state for one in told.inputs] == ["unchanged", "unchanged", "other content"]


def test_files_of_one_name_in_a_pipeline_and_files_that_the_card_does_not_tell_of(tmp_path):
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.safetensors").write_text(part)
    files = tuple(tmp_path / part / "model.safetensors" for part in ("unet", "vae"))
    base = SimpleNamespace(path=tmp_path, files=files)
    plan = SimpleNamespace(base=base, experts=(), expert_specs=())
    digests = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    told = [Input(role, weight, name, digest.strip("`")) for role, weight, name, digest in inputs(plan, digests)]
    assert [one.file for one in told] == ["unet/model.safetensors", "vae/model.safetensors"]
    assert [one.state for one in report_files.compared(told, plan)] == ["unchanged", "unchanged"]
    assert [one.state for one in report_files.compared(told[:1], plan)] == ["unchanged", "not in the card"]


def test_an_input_that_is_gone_is_told(copied, monkeypatch):
    shutil.rmtree(copied / "math")
    made, told = seen(monkeypatch, copied / "merged")
    assert {one.role for one in told.inputs if one.state == "not there"} == {"math"}
    assert re.search(r"^math: .*no such file", made.lacking[0], re.MULTILINE)
    assert told.experts == ["math", "code"]
    assert len(told.inputs) == 3
    assert {one.what for one in told.tensors} == {""}
    assert ("matrix", "average", 6) in told.counts


def test_what_is_no_merged_model_is_refused(models, tmp_path, make_model):
    with pytest.raises(CfmergeError, match=r"has no card .*cfmerge report recipe\.yaml"):
        cfmerge.make_report(models / "base")
    with pytest.raises(CfmergeError, match="no such file"):
        cfmerge.make_report(tmp_path / "nothing.safetensors")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/README.md").write_text("# A model\n")
    with pytest.raises(CfmergeError, match=r"holds no recipe.*recipe\.yaml"):
        cfmerge.make_report(tmp_path / "other")
