"""The steps of a training run are found by names; what is not whole, missing or doubtful is told or refused."""

import json
import shutil

import pytest
from laid import laid, ones
from training_runs import distributed, hugging_face, lightning, orbax

from cfmerge.errors import CfmergeError
from cfmerge.temporal.run_steps import steps_of, window

STEPS = (100, 200, 1000)  # names do not sort as numbers do


def named(run, names):
    return laid(run, {f"{name}/model.safetensors": ones("w") for name in names})


@pytest.mark.parametrize("form", ["checkpoint-{}", "iter_{:07d}", "step-{}", "{}", "step_{}", "ckpt{}-unsharded"])
def test_directories_are_steps_in_the_order_of_their_numbers(tmp_path, form):
    run = named(tmp_path, [form.format(step) for step in STEPS])
    laid(run, {"runs/events": "x", "trainer_log.txt": "1", "eval_results_7.json": {}})
    found = steps_of(run)
    assert [(step.number, step.path) for step in found.steps] == [(n, run / form.format(n)) for n in STEPS]
    assert found.notes == ()


def test_files_are_steps(tmp_path):
    assert steps_of(lightning(tmp_path / "a", STEPS)).numbers == list(STEPS)
    names = ["model_100.safetensors", "model_200.safetensors"]
    run = laid(tmp_path / "b", {name: ones("w") for name in (*names, "final.safetensors")})
    assert steps_of(run).numbers == [100, 200]
    assert steps_of(run).notes == ("final.safetensors: no step in the name; not taken",)
    names = ["epoch1_step100_loss2.safetensors", "epoch2_step250_loss1.safetensors"]
    assert steps_of(laid(tmp_path / "c", {name: ones("w") for name in names})).numbers == [100, 250]


def test_a_model_beside_the_steps_is_no_step(tmp_path):
    """Nor are the shards of one."""
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    laid(tmp_path, {name: ones("w") for name in shards})
    with pytest.raises(CfmergeError, match="no steps in it; steps are called checkpoint-N"):
        steps_of(tmp_path)
    assert steps_of(hugging_face(tmp_path, STEPS)).numbers == list(STEPS)


def test_a_directory_above_the_steps_is_told(tmp_path):
    hugging_face(tmp_path / "out", STEPS)
    with pytest.raises(CfmergeError, match=f"{tmp_path / 'out'} has some: --run {tmp_path / 'out'}"):
        steps_of(tmp_path)
    with pytest.raises(CfmergeError, match="no such directory"):
        steps_of(tmp_path / "nowhere")
    with pytest.raises(CfmergeError, match="is a file; a run is the directory that holds its steps"):
        steps_of(tmp_path / "out" / "checkpoint-100" / "config.json")


def test_two_trainers_in_one_directory_are_refused_with_patterns(tmp_path):
    """The patterns help."""
    hugging_face(tmp_path, (1, 2))
    named(tmp_path, ["step-5", "step-7"])
    with pytest.raises(CfmergeError) as caught:
        steps_of(tmp_path)
    assert "Hugging Face Trainer (checkpoint-1 and 1 more) and torchtitan (step-5 and 1 more)" in str(caught.value)
    assert f"--run '{tmp_path}/checkpoint-*' or --run '{tmp_path}/step-*'" in str(caught.value)
    assert steps_of(tmp_path / "checkpoint-*").numbers == [1, 2]
    assert steps_of(tmp_path / "step-*").numbers == [5, 7]


def test_names_that_could_be_several_things_are_refused(tmp_path):
    run = named(tmp_path / "a", ["big1", "big2", "small1", "small2"])
    with pytest.raises(CfmergeError, match=r"several kinds of names .*/big\*' or --run '.*/small\*'"):
        steps_of(run)
    assert steps_of(run / "small*").numbers == [1, 2]
    with pytest.raises(CfmergeError, match="have several numbers, and none is called a step"):
        steps_of(named(tmp_path / "b", ["a1b2", "a2b3"]))
    with pytest.raises(CfmergeError, match="checkpoint-010 and checkpoint-10 are both step 10; move one"):
        steps_of(named(tmp_path / "c", ["checkpoint-10", "checkpoint-010"]))


def truncated(step):
    file = step / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


def emptied(step):
    shutil.rmtree(step)
    step.mkdir()


def without_a_shard(step):
    (step / "model.safetensors").rename(step / "model-00001-of-00002.safetensors")
    where = {"layer.weight": "model-00001-of-00002.safetensors", "other": "model-00002-of-00002.safetensors"}
    (step / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("damage", [truncated, emptied, without_a_shard])
def test_a_newest_step_that_is_half_written_is_left_out_with_a_note(tmp_path, damage):
    run = hugging_face(tmp_path, STEPS)
    damage(run / "checkpoint-1000")
    found = steps_of(run)
    assert found.numbers == [100, 200]
    (note,) = found.notes
    assert note.startswith("step 1000 is left out: checkpoint-1000: ")
    with pytest.raises(CfmergeError, match=r"--to 1000: checkpoint-1000: .*; the nearest: --to 100 or --to 200"):
        window(found, end=1000)
    damage(run / "checkpoint-200")
    damage(run / "checkpoint-100")
    with pytest.raises(CfmergeError, match="none of 3 steps is whole"):
        steps_of(run)


def test_an_unfinished_step_of_orbax_is_left_out(tmp_path):
    run = orbax(tmp_path, (10, 20, 40))
    (run / "50.orbax-checkpoint-tmp-17").mkdir()
    (run / "30.orbax-checkpoint-tmp-3").mkdir()  # the run was stopped there, and went on
    found = steps_of(run)
    assert found.numbers == [10, 20, 40]
    assert found.notes == ("step 50 is left out: 50.orbax-checkpoint-tmp-17 is not finished",)
    with pytest.raises(CfmergeError, match=r"--from 30: 30\.orbax-checkpoint-tmp-3 is not finished; the nearest"):
        window(found, start=30)


def test_megatron_says_which_iterations_are_whole(tmp_path):
    run = distributed(tmp_path, (100, 200, 300), "iter_{:07d}")
    assert steps_of(run).numbers == [100, 200, 300]
    (run / "latest_checkpointed_iteration.txt").write_text("200\n")
    found = steps_of(run)
    assert found.numbers == [100, 200]
    assert "step 300 is left out: iter_0000300: latest_checkpointed_iteration.txt names 200" in found.notes[0]
    (run / "latest_checkpointed_iteration.txt").write_text("300")
    (run / "iter_0000300" / ".metadata").unlink()
    assert steps_of(run).numbers == [100, 200]


def test_windows(tmp_path):
    found = steps_of(named(tmp_path, [f"step-{n}" for n in range(10, 110, 10)]))
    assert window(found).numbers == list(range(10, 110, 10))
    assert window(found, last=3).numbers == [80, 90, 100]
    assert window(found, start=30, end=60).numbers == [30, 40, 50, 60]
    assert window(found, start=90).numbers == [90, 100]
    assert window(found, end=20).numbers == [10, 20]
    assert window(found, every=4).numbers == [20, 60, 100]
    assert window(found, last=5, every=2).numbers == [60, 80, 100]
    assert window(found, last=1, every=50).numbers == [100]


WRONG = {
    "--last 0: expected 1 or more": {"last": 0},
    "--every -1: expected 1 or more": {"every": -1},
    "--last 11: .* has 10 steps": {"last": 11},
    "--last counts back from the newest step: give it, or --from and --to": {"last": 2, "start": 10},
    "--from 34: .* has no step 34; the nearest: --from 30 or --from 40": {"start": 34},
    "--to 7: .* has no step 7; the nearest: --to 10 or --to 20": {"end": 7},
    "--from 50 --to 20: the first step is behind the last one": {"start": 50, "end": 20},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_window_that_is_not_there_is_refused(tmp_path, message):
    found = steps_of(named(tmp_path, [f"step-{n}" for n in range(10, 110, 10)]))
    with pytest.raises(CfmergeError, match=message):
        window(found, **WRONG[message])


def test_steps_that_are_missing_are_told(tmp_path):
    found = steps_of(named(tmp_path, [f"step-{n}" for n in (10, 20, 50, 60, 70)]))
    assert window(found).notes == ("steps are 10 apart, and not there: 30, 40; the others are taken",)
    assert window(found, last=3).notes == ()
    irregular = steps_of(named(tmp_path / "b", [f"step-{n}" for n in (10, 20, 37)]))
    assert window(irregular).notes == ("steps lie 10 to 17 apart: 10, 20, 37; each counts by its place",)
