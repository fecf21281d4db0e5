"""A setting runs on checkpoints that are there: in its order, a model after each task, on from where it stopped."""

import shutil

import numpy as np
import pytest

import cfmerge
from cfmerge.errors import CfmergeError
from cfmerge.temporal.metrics import geometric_mean
from cfmerge.temporal.setting_runs import read_scores, run_setting
from cfmerge.temporal.settings import Setting, published
from cfmerge.temporal.stages import Time

STREAM = {"first": {"birds": 2, "cars": 1}, "second": {"cars": 3}, "third": {"digits": 1}}
SMALL = Setting("small", ("birds", "cars", "digits"), ("faces",), streams={"one": STREAM}, stream="one")
RULES = {"init": "ema(weight=0.5)", "deploy": "ema(weight=0.5)"}
SCORES = {"birds": 0.5, "cars": 0.25, "digits": 0.75, "faces": 0.5}


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A CLIP model of random weights, with an image and a text part: its directory."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 24, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=6,
    )
    path = tmp_path_factory.mktemp("clip") / "base"
    transformers.CLIPModel(config).save_pretrained(path)
    return path


@pytest.fixture
def small(tmp_path, make_model):
    """A base and an expert for each task of `SMALL`, of one matrix: `(base, experts)`."""
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    base = make_model(tmp_path / "base", {"layer.weight": weight})
    for number, task in enumerate(STREAM, 1):
        make_model(tmp_path / "experts" / task, {"layer.weight": weight + number})
    return base, tmp_path / "experts"


def go(small, tmp_path, **options):
    base, experts = small
    return run_setting(SMALL, tmp_path / "store", base, experts, tmp_path / "served", **{**RULES, **options})


def test_the_published_setting_runs_on_fabricated_clips(clip, make_model, load, tmp_path):
    """20 tasks, BEST-IN-TIME by interpolation: the last model is the unrolled sum, and each step has its metrics."""
    setting = published("fomo-in-flux")
    base = load(clip)
    assert {name.split(".")[0] for name in base} >= {"vision_model", "text_model", "visual_projection"}
    expected = {name: tensor.astype(np.float64) for name, tensor in base.items()}
    for number, task in enumerate(setting.tasks):
        rng = np.random.default_rng(number)
        tensors = {
            name: np.asarray(tensor + rng.normal(0, 0.05, tensor.shape).astype(tensor.dtype))
            for name, tensor in base.items()
        }
        make_model(tmp_path / "experts" / task, tensors)
        shutil.copy(clip / "config.json", tmp_path / "experts" / task)
        expected = {name: (tensor + tensors[name]) / 2 for name, tensor in expected.items()}

    def judged(step, path):
        """Scores of a model that was served: each data set's is a number of the model's weights."""
        weight = float(np.abs(load(path)["visual_projection.weight"]).mean())
        return dict.fromkeys((*setting.adaptation, *setting.held_out), 100 * weight)

    place = [tmp_path / "store", clip, tmp_path / "experts", tmp_path / "served"]
    run = run_setting("fomo-in-flux", *place, scores=judged)
    assert (run.waiting, run.unscored) == ((), [])
    assert [path.name for path in run.served.values()] == ["base", *(f"{n:02d}-task-{n:02d}" for n in range(1, 21))]
    found = load(run.served[20])
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-5, atol=1e-6)
    rows = run.report().rows
    assert [row.step for row in rows] == list(range(21))
    weight = judged(20, run.served[20])["cub200"]
    assert rows[20].geometric_mean == pytest.approx(geometric_mean(weight, weight))
    assert rows[1].undefined["backward_transfer"].startswith("no task was last trained before step 1")
    assert rows[10].backward_transfer is not None
    assert "step 20" in rows[20].undefined["backward_transfer"]  # which trains every data set
    assert run.report().about["setting"] == "fomo-in-flux, stream random-1"


def test_a_run_takes_in_experts_as_they_come(small, tmp_path):
    later = tmp_path / "later"
    shutil.move(small[1] / "third", later)
    run = go(small, tmp_path, scores={0: SCORES})
    assert (run.waiting, run.time.done, run.unscored) == (("third",), ["first", "second"], [1, 2])
    shutil.move(later, small[1] / "third")
    run = go(small, tmp_path, scores={3: SCORES})
    assert (run.waiting, run.time.done, run.unscored) == ((), ["first", "second", "third"], [1, 2])
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == ["01-first", "02-second", "03-third"]


@pytest.mark.parametrize("stage", ["store", "deploy", "evaluate"])
def test_a_run_that_stopped_goes_on_to_the_same_models(small, tmp_path, monkeypatch, load, stage):
    asked = []

    def judged(step, path):
        asked.append(step)
        return SCORES

    whole = go(small, tmp_path / "whole", scores=judged)
    expected = {step: load(path)["layer.weight"] for step, path in whole.served.items()}
    assert asked == [0, 1, 2, 3]
    inner, calls = getattr(Time, stage), []

    def stopping(self, *arguments, **options):
        calls.append(stage)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Time, stage, stopping)
        with pytest.raises(KeyboardInterrupt):
            go(small, tmp_path, scores=judged)
    asked.clear()
    run = go(small, tmp_path, scores=judged)
    assert run.unscored == []
    assert asked == ([1, 2, 3] if stage == "evaluate" else [0, 1, 2, 3])  # what is known is not asked again
    for step, path in run.served.items():
        np.testing.assert_array_equal(load(path)["layer.weight"], expected[step])


def test_models_that_were_evaluated_may_be_deleted(small, tmp_path):
    run = go(small, tmp_path, scores=dict.fromkeys(range(4), SCORES))
    shutil.rmtree(run.served[1])
    again = go(small, tmp_path, scores={1: {"birds": 0.625}})  # known better since
    assert sorted(again.served) == [0, 2, 3]
    assert again.unscored == []
    assert again.report().history[1] == {**SCORES, "birds": 0.625}


def test_experts_are_files_too_and_are_copied_when_asked(small, tmp_path, load):
    experts = small[1]
    shutil.move(experts / "first" / "model.safetensors", experts / "one.safetensors")
    shutil.rmtree(experts / "first")
    (experts / "one.safetensors").rename(experts / "first.safetensors")
    run = go(small, tmp_path, link=False)
    shutil.rmtree(experts)
    model = run.time.deploy(tmp_path / "again")
    np.testing.assert_array_equal(load(model)["layer.weight"], load(run.served[3])["layer.weight"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda experts: shutil.rmtree(experts / "second"), "no checkpoint of task 'second', which comes next"),
        (lambda experts: (experts / "first").rename(experts / "frist"), "task 'first'.*did you mean 'frist'"),
        (lambda experts: shutil.rmtree(experts), "is no directory"),
        (lambda experts: (experts / "first.safetensors").write_bytes(b""), "both named after task 'first'; keep one"),
    ],
)
def test_experts_that_are_not_as_the_setting_says_are_refused_before_anything_is_stored(small, tmp_path, change, told):
    change(small[1])
    with pytest.raises(CfmergeError, match=told):
        go(small, tmp_path)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scores": {0: {"bird": 1}}}, "unknown task 'bird'; did you mean 'birds'"),
        ({"scores": {4: SCORES}}, r"step 4: there are steps 0 \(the base\) to 3"),
        ({"deploy": None}, "name both rules"),
        ({"init": None, "deploy": None}, "names no protocols"),
        ({"protocol": "offline"}, "leave init and deploy out"),
        ({"stream": "two"}, "unknown stream 'two'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_stored(small, tmp_path, options, told):
    with pytest.raises(CfmergeError, match=told):
        go(small, tmp_path, **options)
    assert not (tmp_path / "store").exists()


def test_a_store_of_another_order_is_refused(small, tmp_path):
    base, experts = small
    time = Time(
        tmp_path / "store", base, tasks=SMALL.adaptation, held_out=SMALL.held_out, trained=SMALL.trained, **RULES
    )
    time.store(experts / "second", "second")
    with pytest.raises(CfmergeError, match="holds the experts second, in this order; stream 'one' begins with first"):
        go(small, tmp_path)
    assert Time(tmp_path / "store").done == ["second"]


def test_scores_by_step_are_read_from_json_and_csv(tmp_path):
    path = tmp_path / "scores"
    path.write_text('{"0": {"birds": 0.5}, "2": {"birds": 1}}')
    assert read_scores(path) == {0: {"birds": 0.5}, 2: {"birds": 1.0}}
    path.write_text("step,task,score\n0,birds,0.5\n0,cars,0.25\n2,birds,1\n")
    assert read_scores(path) == {0: {"birds": 0.5, "cars": 0.25}, 2: {"birds": 1.0}}
    for text, told in (
        ("task,score\nbirds,1\n", "expected the columns step, task, score; found task, score"),
        ("step,task,score\n0,birds,1\n0,birds,2\n", "step 0 has two scores of 'birds'"),
        ("step,task,score\n0,birds,high\n", "is no table of scores"),
        ('{"a": {"birds": 1}}', "is no table of scores"),
        ('{"0": 3}', "is no table of scores"),
        ("{", "is no table of scores"),
    ):
        path.write_text(text)
        with pytest.raises(CfmergeError, match=told):
            read_scores(path)
    with pytest.raises(cfmerge.CfmergeError, match="is no table of scores"):
        read_scores(tmp_path / "nothing")
