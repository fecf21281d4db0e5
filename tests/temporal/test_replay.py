"""Replay buffers: uniform samples, the same for any batches and after any stop; what does not fit is refused."""

import ml_dtypes
import numpy as np
import pytest

from cfmerge.errors import CfmergeError
from cfmerge.temporal.replay import PerTask, Replay, Reservoir

KINDS = (Reservoir, PerTask)


def numbered(start, count):
    """Examples that tell their number."""
    number = np.arange(start, start + count)
    return {"number": number, "image": np.repeat(number[:, None], 3, axis=1).astype(np.float32)}


def kept(buffer):
    """The numbers of the examples that are kept, sorted."""
    return sorted(buffer.draw(len(buffer), 0)["number"].tolist())


def chi_square(counts):
    """Pearson's statistic of counts that should be equal."""
    expected = counts.mean()
    return float(np.sum((counts - expected) ** 2) / expected)


def test_a_reservoir_keeps_each_example_equally_often():
    """200 examples of two tasks, 20 places, 2000 seeds: 199 degrees of freedom, whose 1 - 1e-6 quantile is 305."""
    counts = np.zeros(200)
    for seed in range(2000):
        buffer = Reservoir(20, seed)
        buffer.add({"number": np.arange(150)}, "a")
        buffer.add({"number": np.arange(150, 200)}, "b")
        counts[buffer.draw(20)["number"]] += 1
    assert counts.sum() == 2000 * 20
    # Places are drawn without replacement, so the statistic is (1 - 20/200) times one of chi-square
    assert 0.9 * 130 < chi_square(counts) < 0.9 * 305


def test_of_few_examples_each_pair_is_kept_equally_often():
    """Two of four: six pairs, 3000 seeds; an index that is off by one would show here."""
    counts = np.zeros((4, 4))
    for seed in range(3000):
        buffer = Reservoir(2, seed)
        buffer.add({"number": np.arange(4)}, "a")
        counts[tuple(kept(buffer))] += 1
    pairs = counts[np.triu_indices(4, 1)]
    assert pairs.sum() == 3000
    assert chi_square(pairs) < 30  # five degrees of freedom: by chance once in 70,000


def test_shares_of_tasks_are_equal_and_each_a_uniform_sample_even_after_they_shrink():
    counts = np.zeros(120)
    for seed in range(2000):
        buffer = PerTask(30, seed)
        for start, task in ((0, "a"), (60, "b"), (90, "c")):
            buffer.add({"number": np.arange(start, start + (60 if task == "a" else 30))}, task)
        assert buffer.counts() == {"a": 10, "b": 10, "c": 10}
        counts[buffer.draw(30)["number"]] += 1
    for part, share in ((counts[:60], 10 / 60), (counts[60:90], 10 / 30), (counts[90:], 10 / 30)):
        freedom = len(part) - 1  # six standard deviations around the mean of chi-square
        assert abs(chi_square(part) / (1 - share) - freedom) < 6 * np.sqrt(2 * freedom)


def test_a_task_that_comes_again_is_sampled_over_all_of_its_examples():
    counts = np.zeros(90)
    for seed in range(2000):
        buffer = PerTask(20, seed)
        buffer.add({"number": np.arange(30)}, "a")
        buffer.add({"number": np.arange(90, 120)}, "b")
        buffer.add({"number": np.arange(30, 90)}, "a")
        drawn = buffer.draw(20)["number"]
        counts[drawn[drawn < 90]] += 1
    assert abs(chi_square(counts) / (1 - 10 / 90) - 89) < 6 * np.sqrt(2 * 89)


@pytest.mark.parametrize("kind", KINDS)
def test_the_buffer_is_the_same_however_examples_are_cut_into_batches(kind):
    whole, pieces = kind(16, 3), kind(16, 3)
    whole.add(numbered(0, 50), "a")
    whole.add(numbered(50, 41), "b")
    for start, count, task in ((0, 7, "a"), (7, 1, "a"), (8, 42, "a"), (50, 40, "b"), (90, 0, "b"), (90, 1, "b")):
        pieces.add(numbered(start, count), task)
        if len(pieces) > 3:
            pieces.draw(3)  # draws do not change what is kept
    assert kept(whole) == kept(pieces)
    assert whole.seen == pieces.seen == 91
    different = kind(16, 4)
    different.add(numbered(0, 50), "a")
    different.add(numbered(50, 41), "b")
    assert kept(different) != kept(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_stopped_draws_what_a_run_without_a_stop_draws(kind, tmp_path):
    buffer = kind(12, 0)
    buffer.add(numbered(0, 40), "a")
    buffer.draw(5)
    again = Replay.load(buffer.save(tmp_path / "replay.npz"))
    assert type(again) is kind
    for each in (buffer, again):
        each.draw(4)
        each.add(numbered(40, 30), "b")
        each.add(numbered(70, 30), "c")
        each.add(numbered(100, 10), "a")
    assert (again.tasks, again.seen, again.capacity, again.counts()) == (
        ["a", "b", "c"], 110, 12, buffer.counts(),
    )  # fmt: skip
    for _ in range(3):
        one, other = buffer.draw(6), again.draw(6)
        assert set(one) == {"number", "image", "task"}
        for name, column in one.items():
            np.testing.assert_array_equal(column, other[name])
            assert column.dtype == other[name].dtype


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_any_dtype_come_back_from_the_file(kind, tmp_path):
    examples = {
        "half": np.arange(6).astype(ml_dtypes.bfloat16),
        "eight": np.arange(6).astype(ml_dtypes.float8_e4m3fn),
        "text": np.array(["a", "bb", "ccc", "ä", "", "f"]),
        "bytes": np.array([b"a", b"bb"] * 3),
        "flag": np.array([True, False] * 3),
        "odd/name": np.zeros((6, 0, 2), np.int8),
    }
    buffer = kind(6, 0)
    buffer.add(examples, "a")
    found = kind.load(buffer.save(tmp_path / "deep" / "replay.npz")).draw(6, 1)
    for name, column in buffer.draw(6, 1).items():
        assert found[name].dtype == column.dtype
        np.testing.assert_array_equal(found[name], column)
    assert kind.load(buffer.save(tmp_path / "empty.npz")).draw(1)["task"].tolist() == ["a"]


def test_an_empty_buffer_is_saved_and_filled_later(tmp_path):
    again = Reservoir.load(Reservoir(4, 9).save(tmp_path / "replay.npz"))
    direct = Reservoir(4, 9)
    for buffer in (again, direct):
        buffer.add(numbered(0, 30), "a")
    assert kept(again) == kept(direct)


def test_each_drawn_example_has_its_own_task_and_all_its_columns():
    for kind in KINDS:
        buffer = kind(10, 0)
        for task, start in (("a", 0), ("b", 100), ("c", 200)):
            buffer.add(numbered(start, 20), task)
        drawn = buffer.draw(200, replace=True)
        assert drawn["task"].tolist() == ["abc"[number // 100] for number in drawn["number"]]
        np.testing.assert_array_equal(drawn["image"], np.repeat(drawn["number"][:, None], 3, axis=1))
        alone = buffer.draw(10)["number"].tolist()
        assert len(set(alone)) == 10  # without replacement


def test_a_seed_of_a_draw_repeats_it_and_leaves_the_buffers_own_draws_alone():
    one, other = Reservoir(10, 0), Reservoir(10, 0)
    for buffer in (one, other):
        buffer.add(numbered(0, 100), "a")
    first = one.draw(5, 7)["number"].tolist()
    assert one.draw(5, np.random.default_rng(7))["number"].tolist() == first
    np.testing.assert_array_equal(one.draw(5)["number"], other.draw(5)["number"])


def test_shares_shrink_as_tasks_come_and_first_tasks_have_the_places_left_over():
    buffer = PerTask(10, 0)
    buffer.add(numbered(0, 3), "a")
    assert buffer.counts() == {"a": 3}
    buffer.add(numbered(3, 40), "b")
    assert buffer.counts() == {"a": 3, "b": 5}
    buffer.add(numbered(43, 40), "c")
    assert buffer.counts() == {"a": 3, "b": 3, "c": 3}
    buffer.add(numbered(83, 9), "a")
    assert buffer.counts() == {"a": 4, "b": 3, "c": 3}


def test_a_task_without_a_share_is_refused_and_nothing_is_lost():
    buffer = PerTask(2, 0)
    for task in "ab":
        buffer.add(numbered(0, 5), task)
    before = kept(buffer)
    with pytest.raises(CfmergeError, match="task 'c': a buffer of 2 has no share for 3 tasks"):
        buffer.add(numbered(5, 5), "c")
    assert (kept(buffer), buffer.tasks) == (before, ["a", "b"])


@pytest.mark.parametrize(
    ("examples", "told"),
    [
        ({}, "found none"),
        ({"number": np.arange(2)}, r"examples have \['number'\]; those before had \['image', 'number'\]"),
        ({**numbered(0, 2), "task": np.arange(2)}, "the name 'task' is the buffer's own"),
        ({**numbered(0, 2), "image": np.zeros((2, 4), np.float32)}, r"'image': each was \(3,\) of float32 before"),
        ({**numbered(0, 2), "image": np.zeros((2, 3))}, r"is \(3,\) of float64 now"),
        ({**numbered(0, 2), "number": np.arange(3)}, "'number' has 3, 'image' has 2"),
        ({**numbered(0, 2), "number": np.int64(3)}, r"'number': expected an array .* found shape \(\)"),
        ({**numbered(0, 2), "number": np.array([None, 1])}, "'number': .* dtype object"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_examples_of_another_form_are_refused_and_nothing_is_lost(kind, examples, told):
    buffer = kind(4, 0)
    buffer.add(numbered(0, 10), "a")
    before = kept(buffer)
    with pytest.raises(CfmergeError, match=told):
        buffer.add(examples, "b")
    assert (kept(buffer), buffer.tasks, buffer.seen) == (before, ["a"], 10)


def test_draws_that_cannot_be_made_tell_the_way_out():
    buffer = Reservoir(4, 0)
    with pytest.raises(CfmergeError, match="empty: add examples first"):
        buffer.draw(1)
    buffer.add(numbered(0, 3), "a")
    with pytest.raises(CfmergeError, match=r"4 examples asked for, the replay buffer holds 3: draw\(..., replace=True"):
        buffer.draw(4)
    assert len(buffer.draw(0)["number"]) == 0
    for capacity in (0, -1, 2.5, True):
        with pytest.raises(CfmergeError, match="capacity"):
            PerTask(capacity, 0)


def test_files_that_hold_no_buffer_or_another_kind_are_refused(tmp_path):
    path = tmp_path / "replay.npz"
    with pytest.raises(CfmergeError, match="there is no such file"):
        Reservoir.load(path)
    buffer = Reservoir(4, 0)
    buffer.add(numbered(0, 9), "a")
    buffer.save(path)
    with pytest.raises(CfmergeError, match=r"holds a Reservoir, not a PerTask: Reservoir\.load"):
        PerTask.load(path)
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"nothing", content.replace(b'"rule"', b'"ruin"')):
        path.write_bytes(broken)
        with pytest.raises(CfmergeError, match=r"replay\.npz: "):
            Reservoir.load(path)
    np.savez(path, a=np.zeros(2))
    with pytest.raises(CfmergeError, match="no replay buffer"):
        Reservoir.load(path)


def test_a_save_that_fails_leaves_the_file_before_it(tmp_path, monkeypatch):
    path = tmp_path / "replay.npz"
    buffer = Reservoir(4, 0)
    buffer.add(numbered(0, 9), "a")
    buffer.save(path)
    before = path.read_bytes()

    def full(stream, **arrays):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        buffer.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["replay.npz"]
