"""Training runs as they lie on real disks: checkpoints that are cut, linked to nowhere, or written in part."""

import pytest
from training_runs import hugging_face

from cfmerge.errors import CfmergeError
from cfmerge.temporal.trajectory import along


@pytest.fixture
def run(tmp_path):
    return hugging_face(tmp_path / "run", (100, 200, 300))


def steps(window):
    return [step.number for step in window.steps]


def test_a_newest_step_with_one_of_its_shards_is_left_out_with_a_note(run):
    """The trainer has written the first shard; the second one and the index are not there yet."""
    (run / "checkpoint-300" / "model.safetensors").rename(run / "checkpoint-300" / "model-00001-of-00002.safetensors")
    window = along(run)
    assert steps(window) == [100, 200]
    assert "step 300 is left out: checkpoint-300: " in window.notes[0]
    assert "is one of 2 shards" in window.notes[0]


def test_a_newest_step_that_is_a_link_to_nowhere_is_left_out_with_a_note(run):
    (run / "checkpoint-400").symlink_to("nowhere")
    window = along(run)
    assert steps(window) == [100, 200, 300]
    assert "step 400 is left out" in window.notes[0]


@pytest.mark.parametrize("kind", ["cut", "empty"])
def test_a_step_in_the_middle_that_is_broken_is_told_with_the_way_out(run, kind, tmp_path):
    file = run / "checkpoint-200" / "model.safetensors"
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    else:
        file.unlink()
    with pytest.raises(CfmergeError, match=r"step 200.*move it away, or .*--from 300"):
        along(run)
