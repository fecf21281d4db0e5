"""Processes meet beside their output: what one tells all hear, and one error ends them all. Here they are threads."""

import contextlib
import threading
from pathlib import Path

import numpy as np
import pytest

from cfmerge.errors import CfmergeError, NonFiniteError, StoppedError
from cfmerge.formats import meeting
from cfmerge.formats.meeting import Meeting
from cfmerge.formats.packed import packed, unpacked


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(meeting, "BEAT", 0.05)
    monkeypatch.setattr(meeting, "GONE", 0.6)
    monkeypatch.setattr(meeting, "COME", 5.0)


def met(output: Path, count: int, do) -> list:
    """What `do(meeting)` gives in each of the processes, or the error that it ends with."""
    results = [None] * count

    def run(number: int) -> None:
        try:
            with Meeting(output, number, count) as own, own.telling():
                results[number] = do(own)
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_all_hear_all_values_and_nothing_is_left(tmp_path):
    def do(own):
        own.begin()
        with own.at_once():
            return own.gathered("a", [own.number, np.arange(own.number), {("t", 1): (np.float32(0.5), None)}])

    found = met(tmp_path / "new" / "out", 3, do)
    for each in found:
        assert [one[0] for one in each] == [0, 1, 2]
        assert [one[1].tolist() for one in each] == [[], [0], [0, 1]]
        assert each[2][2] == {("t", 1): (0.5, None)}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_ends_all_with_its_message(tmp_path, failing):
    def do(own):
        if own.number == failing:
            raise CfmergeError("expert 'a' is not there")
        own.gathered("a", None)

    for error in met(tmp_path / "out", 3, do):
        assert type(error) is CfmergeError
        assert str(error) == "expert 'a' is not there"
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_and_a_fault_of_the_program_stop_the_others(tmp_path):
    for cause, words in ((KeyboardInterrupt(), "process 1 of 2 was interrupted"), (ZeroDivisionError("x"), "failed")):

        def do(own, cause=cause):
            if own.number == 1:
                raise cause
            own.gathered("a", None)

        first, second = met(tmp_path / "out", 2, do)
        assert isinstance(first, StoppedError)
        assert words in str(first)
        assert second is cause


def test_all_leave_out_the_same_expert_and_go_on(tmp_path):
    """Two find another one at once: all hear of that which was told first."""

    def do(own):
        own.begin()
        try:
            with own.at_once():
                if own.number:
                    raise NonFiniteError(f"expert {own.number}", source=f"e{own.number}", tensor="t")
                own.gathered("a", None)
        except NonFiniteError as error:
            own.begin()
            with own.at_once():
                return own.gathered("again", error.source)

    first, *others = met(tmp_path / "out", 3, do)
    assert others == [first, first]
    assert set(first) in ({"e1"}, {"e2"})


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_gone_ends_the_others(tmp_path, killed):
    """A thread that has stopped to beat stands for a process that was killed; nothing waits for it for ever."""

    def do(own):
        own.begin()
        with own.at_once():
            if own.number == killed:
                own._ending.set()
                own._beating.join()
                threading.Event().wait(3)  # long after the others have ended
                with contextlib.suppress(CfmergeError):
                    own.check()
                return None
            return own.gathered("a", None)

    found = met(tmp_path / "out", 3, do)
    for number, error in enumerate(found):
        if number != killed:
            assert isinstance(error, StoppedError)
            assert f"process {killed} of 3 is gone" in str(error)


def test_a_second_meeting_for_one_output_is_refused_and_does_no_harm(tmp_path):
    def do(own):
        if own.number == 0:
            with pytest.raises(CfmergeError, match="other processes write it now"), Meeting(tmp_path / "out", 0, 2):
                pass
        return own.gathered("a", own.number)

    assert met(tmp_path / "out", 2, do) == [[0, 1], [0, 1]]


def test_what_a_killed_meeting_left_is_no_process(tmp_path, monkeypatch):
    """Its files are there still; a process that does not come is missed."""
    place = tmp_path / ".out.cfmerge-00000000"
    (place / "abc").mkdir(parents=True)
    (place / "1-0123456789abcdef").write_text("7")
    (place / "abc" / "peers").write_text('["abc", "0123456789abcdef"]')
    monkeypatch.setattr(meeting, "COME", 0.5)
    with pytest.raises(CfmergeError, match="have not come"), Meeting(tmp_path / "out", 0, 2):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CfmergeError, match="process 0 has not come"), Meeting(tmp_path / "out", 1, 2):
        pass


def test_values_keep_their_types():
    value = {"a": [1, 2.5, "x", None, True], ("b", 0): (np.float32(3), np.zeros((2, 0), np.uint32), np.eye(2))}
    again = unpacked(packed(value))
    assert again["a"] == value["a"]
    assert isinstance(again["b", 0][0], np.float32)
    assert again["b", 0][1].shape == (2, 0)
    assert again["b", 0][1].dtype == np.uint32
    np.testing.assert_array_equal(again["b", 0][2], np.eye(2))
    with pytest.raises(TypeError):
        packed({"a": object()})
