"""A window of a run is one merge: the identity of decays, integers and objects of the newest step, any method."""

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from training_runs import assert_mean, distributed, hugging_face, lightning, orbax, tensors

import cfmerge
from cfmerge.errors import CfmergeError
from cfmerge.formats import journal
from cfmerge.formats.journal import FileJournal
from cfmerge.products import carry_out
from cfmerge.temporal.decays import coefficients, decay_weights
from cfmerge.temporal.trajectory import along

STEPS = (10, 20, 30, 40)


@pytest.fixture
def run(tmp_path):
    return hugging_face(tmp_path / "run", STEPS)


def merged(window, path):
    cfmerge.merge_recipe(window.recipe, path)
    return cfmerge.open(path)


@pytest.mark.parametrize("decay", ["linear", "cosine", "inverse-sqrt", "ema=0.7"])
def test_a_decay_is_the_weighted_mean_of_the_window(run, tmp_path, decay):
    """theta_0 + sum_i w_i g_i, summed here in float64 along the updates."""
    window = along(run, decay=decay)
    found = merged(window, tmp_path / "out")
    w = decay_weights(decay, 3)
    for name in ("layer.weight", "layer.bias"):
        theta = [tensors(step)[name].astype(np.float64) for step in STEPS]
        expected = theta[0] + sum(w[i] * (theta[i + 1] - theta[i]) for i in range(3))
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=5e-7)
    assert window.weights == tuple(coefficients(w))
    assert found["updates"] == [40]


def test_without_more_it_is_the_uniform_mean(run, tmp_path):
    window = along(run, last=3)
    assert ([step.number for step in window.steps], window.decay) == ([20, 30, 40], "linear")
    assert_mean(merged(window, tmp_path / "out"), STEPS[1:], np.full(3, 1 / 3))


def test_random_weights_that_sum_to_one(run, tmp_path):
    """Negative ones too."""
    random = np.random.default_rng(1)
    for number in range(3):
        weights = random.standard_normal(4)
        weights += (1 - weights.sum()) / 4
        assert_mean(merged(along(run, weights=weights), tmp_path / f"out{number}"), STEPS, weights)


def test_weights_that_do_not_sum_to_one_are_refused_with_those_that_do(run):
    with pytest.raises(CfmergeError) as caught:
        along(run, weights=[1, 1, 1, 2])
    assert "they sum to 5, expected 1" in str(caught.value)
    assert "--weights 0.2,0.2,0.2,0.4" in str(caught.value)
    assert along(run, weights=[0.2, 0.2, 0.2, 0.4]).weights == (0.2, 0.2, 0.2, 0.4)
    with pytest.raises(CfmergeError, match="3 weights for 4 steps: 10, 20, 30, 40"):
        along(run, weights=[0.2, 0.2, 0.6])
    with pytest.raises(CfmergeError, match="must be finite, found nan"):
        along(run, weights=[float("nan"), 0, 0, 1])
    with pytest.raises(CfmergeError, match="--decay and --weights both"):
        along(run, weights=[0.5, 0.5], decay="linear")


def test_a_window_of_one_step_is_that_step(run, tmp_path):
    found = merged(along(run, last=1), tmp_path / "out")
    assert all((found[name] == array).all() for name, array in tensors(40).items())


def test_steps_of_weight_0_are_not_read(run, tmp_path):
    """But for the integers of the newest."""
    window = along(run, weights=[0, 0.25, 0.75, 0])
    assert [expert.name for expert in window.recipe.experts] == ["step-20"]
    assert window.notes == ("steps 10, 40 have weight 0, and take no part",)
    found = merged(window, tmp_path / "out")
    assert_mean(found, STEPS, np.array([0, 0.25, 0.75, 0]))
    assert found["updates"] == [40]


@pytest.mark.parametrize("step", [10, 30])
def test_integers_of_a_named_step(run, tmp_path, step):
    """In the window or not."""
    found = merged(along(run, last=2, extra_from=step), tmp_path / "out")
    assert found["updates"] == [step]
    assert_mean(found, STEPS[2:], np.array([0.5, 0.5]))
    with pytest.raises(CfmergeError, match=r"--extra-from 35: .* has no step 35; the nearest: --extra-from 30 or"):
        along(run, extra_from=35)
    with pytest.raises(CfmergeError, match="--extra-from and --unmerged both"):
        along(run, extra_from=30, unmerged="step-10")


def test_sums_are_in_float32_whatever_the_files_hold(tmp_path):
    """The mean of bfloat16 steps is rounded once."""
    run = hugging_face(tmp_path / "run", tuple(range(9)), ml_dtypes.bfloat16)
    found = merged(along(run), tmp_path / "out")["layer.weight"]
    exact = np.mean([tensors(step, ml_dtypes.bfloat16)["layer.weight"].astype(np.float64) for step in range(9)], 0)
    assert found.dtype == ml_dtypes.bfloat16
    assert (found == exact.astype(ml_dtypes.bfloat16)).mean() > 0.9  # but for ties of rounding
    wide = merged(along(run, dtype="float32"), tmp_path / "wide")["layer.weight"]
    np.testing.assert_allclose(wide, exact, rtol=0, atol=1e-6)


def test_a_run_that_has_stalled(run, tmp_path):
    """Two steps of the same weights count as two, and a note says so."""
    (run / "checkpoint-30" / "model.safetensors").write_bytes((run / "checkpoint-20/model.safetensors").read_bytes())
    result = cfmerge.merge_recipe(along(run).recipe, tmp_path / "out")
    assert_mean(cfmerge.open(tmp_path / "out"), (10, 20, 20, 40), np.full(4, 0.25))
    assert any("'step-30' holds the same weights as expert 'step-20'" in note for note in result.notes)


def test_steps_that_differ_are_not_compared_in_full(run, tmp_path, monkeypatch):
    """In a window of many steps each would be read once for each other one."""
    compared = []
    same = carry_out.same_content
    monkeypatch.setattr(carry_out, "same_content", lambda *models: compared.append(models) or same(*models))
    cfmerge.merge_recipe(along(run).recipe, tmp_path / "out")
    assert compared == []
    (run / "checkpoint-30" / "model.safetensors").write_bytes((run / "checkpoint-20/model.safetensors").read_bytes())
    cfmerge.merge_recipe(along(run).recipe, tmp_path / "again")
    assert [(str(a.path)[-2:], str(b.path)[-2:]) for a, b, _ in compared] == [("20", "30")]


def test_any_method_takes_the_window(run, tmp_path):
    """The first step is its base, the others are experts without weights; integers are the newest's."""
    window = along(run, method="ties", parameters={"density": 0.6})
    assert window.recipe.base == str(run / "checkpoint-10")
    assert window.weights == (None, 1.0, 1.0, 1.0)
    assert window.notes == ("step 10 is the base of ties: the deltas are the updates since then",)
    found = merged(window, tmp_path / "out")
    steps = [run / f"checkpoint-{step}" for step in STEPS]
    cfmerge.merge(steps[0], steps[1:], "ties(density=0.6)", output=tmp_path / "plain", unmerged="base")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert all((found[name] == plain[name]).all() for name in ("layer.weight", "layer.bias"))
    assert (found["updates"], plain["updates"]) == ([40], [10])


def test_a_method_takes_the_weights_of_a_decay(run, tmp_path):
    """The base keeps the share of the first step, so task arithmetic gives the mean."""
    window = along(run, method="task_arithmetic(scale=1)", decay="cosine")
    weights = coefficients(decay_weights("cosine", 3))
    assert window.weights == (None, *weights[1:])
    assert_mean(merged(window, tmp_path / "out"), STEPS, weights)
    assert "divides by the sum of the weights" in along(run, method="average", decay="cosine").notes[0]
    given = along(run, method="task_arithmetic", weights=[1, 2, 3])
    assert [expert.weight for expert in given.recipe.experts] == [1, 2, 3]


WRONG = {
    "--decay: metagpt knows no weights of experts": {"method": "metagpt", "decay": "linear"},
    "--weights: metagpt knows no weights of experts": {"method": "metagpt", "weights": [1, 1, 1]},
    "4 weights for the 3 experts of ties: 20, 30, 40; step 10 is the base": {"method": "ties", "weights": [1] * 4},
    "ties: the window has one step, 40, which is the base": {"method": "ties", "last": 1},
    "a weighted mean has none; name the method: -m": {"parameters": {"scale": 1}},
    "unknown method 'tie'": {"method": "tie"},
    "decay 'cosin' is not known; did you mean 'cosine'": {"decay": "cosin"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_go_together_is_refused(run, message):
    with pytest.raises(CfmergeError, match=message):
        along(run, **WRONG[message])


def test_a_base_of_the_users(run, tmp_path):
    """The steps are all experts, and the mean is the same; with a method the deltas are from that base."""
    base = hugging_face(tmp_path / "other", (0,)) / "checkpoint-0"
    window = along(run, base=base, decay="ema=0.5")
    assert len(window.recipe.experts) == 4
    found = merged(window, tmp_path / "out")
    assert_mean(found, STEPS, coefficients(decay_weights("ema=0.5", 3)))
    assert found["updates"] == [40]
    assert along(run, base=base, method="ties").weights == (1.0,) * 4


def test_adapters_need_the_model_that_they_change(run, tmp_path):
    for step in (10, 20):
        a, b = np.full((1, 3), step, np.float32), np.ones((5, 1), np.float32)
        factors = {"base_model.model.layer.lora_A.weight": a, "base_model.model.layer.lora_B.weight": b}
        path = tmp_path / "adapters" / f"checkpoint-{step}"
        cfmerge.save(factors, path / "adapter_model.safetensors")
        config = '{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["layer"]}'
        (path / "adapter_config.json").write_text(config)
    with pytest.raises(CfmergeError, match="is an adapter; name the model that the run's adapters change: --base"):
        along(tmp_path / "adapters")
    base = run / "checkpoint-10"
    found = merged(along(tmp_path / "adapters", base=base), tmp_path / "out")
    np.testing.assert_allclose(found["layer.weight"], tensors(10)["layer.weight"] + 15, rtol=1e-6)
    assert found["updates"] == [10]


def test_a_damaged_step_in_the_window_is_refused_by_name(run, tmp_path):
    file = run / "checkpoint-20" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CfmergeError, match="checkpoint-20"):
        cfmerge.merge_recipe(along(run).recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert_mean(merged(along(run, start=30), tmp_path / "out"), STEPS[2:], np.array([0.5, 0.5]))


# --- formats ------------------------------------------------------------------------------------------------------


def test_steps_of_lightning(tmp_path):
    run = lightning(tmp_path / "run", STEPS)
    found = merged(along(run, every=2), tmp_path / "out.ckpt")
    assert_mean(found, STEPS[1::2], np.array([0.5, 0.5]))
    assert found["updates"] == [40]
    state = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
    assert set(state) == set(tensors(40))


def test_steps_of_orbax(tmp_path):
    found = merged(along(orbax(tmp_path / "run", STEPS), decay="cosine"), tmp_path / "out")
    assert_mean(found, STEPS, coefficients(decay_weights("cosine", 3)))
    assert found["updates"] == [40]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "step"), [("iter_{:07d}", None), ("step-{}", 20)])
def test_distributed_steps_and_their_objects(tmp_path, name, step):
    """Objects that are no tensors are the newest step's, or those of a named one."""
    run = distributed(tmp_path / "run", STEPS, name)
    found = merged(along(run, start=20, extra_from=step), tmp_path / "out")
    assert_mean(found, STEPS[1:], np.full(3, 1 / 3), "model.")
    assert found["model.updates"] == [step or 40]
    state = {"model": {"layer._extra_state": {"scale": None}}}
    torch.distributed.checkpoint.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    assert state["model"]["layer._extra_state"] == {"scale": step or 40}


def test_a_merge_that_was_stopped_goes_on(run, tmp_path, monkeypatch, contents):
    """As every merge does: with the same bytes in the end."""
    window = along(run, decay="cosine")
    expected = cfmerge.merge_recipe(window.recipe, tmp_path / "expected")
    marks = iter(range(1))

    class Stopping(FileJournal):
        def mark(self, ranges, told=None):
            if next(marks, None) is None:
                raise KeyboardInterrupt
            super().mark(ranges, told)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "EVERY", 0.0)
        patch.setattr(carry_out, "FileJournal", Stopping)
        with pytest.raises(KeyboardInterrupt):
            cfmerge.merge_recipe(window.recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = cfmerge.merge_recipe(along(run, decay="cosine").recipe, tmp_path / "out")
    assert result.resumed
    assert contents(tmp_path / "out") == contents(expected.output)
