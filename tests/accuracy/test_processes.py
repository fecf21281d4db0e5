"""Processes with cores of their own."""

import os
import pickle
import time

import pytest

from cfmerge.errors import CfmergeError
from cfmerge_accuracy import processes
from cfmerge_accuracy.vision import suite

linux = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not tell of cores")


@linux
def test_a_model_is_trained_on_one_core(tmp_path, monkeypatch):
    """Whatever the number of cores: the order in which XLA adds up depends on it."""
    monkeypatch.setenv("CFMERGE_CACHE", str(tmp_path))
    with processes.one_core_each(8) as found:
        assert found.at_once == len(processes.cores()[:8])
        assert len(found.call(os.sched_getaffinity, 0)) == 1
        domain = found.call(pickle.loads, pickle.dumps(suite.DOMAIN))
    assert domain is suite.DOMAIN


def test_cores_are_shared_out():
    assert processes.shared([0, 1, 2, 3, 4, 5, 6], 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert processes.shared([5], 1) == [[5]]
    assert processes.shared([], 2) == [[], []]


def test_results_come_in_order_from_processes_at_once():
    with processes.sharing(2, [], print) as found:
        assert list(found.map(pow, [2, 3, 4], [5, 4, 3])) == [32, 81, 64]
        apart = set(found.map(_after_a_second, range(2)))
    assert len(apart) == 2
    assert os.getpid() not in apart


def _after_a_second(_: int) -> int:
    time.sleep(1)
    return os.getpid()


@pytest.mark.parametrize("calls", [1, 5])
def test_a_process_that_dies_is_told_of(calls):
    with (
        pytest.raises(CfmergeError, match=r"before its time.*--jobs 1"),
        processes.sharing(2, [], os._exit, 1) as found,
    ):
        list(found.map(print, range(calls)))
