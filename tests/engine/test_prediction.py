"""Predictions of seconds and memory: pure arithmetic on plans, with rates that are made up."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import cfmerge
from cfmerge import linalg, methods
from cfmerge.core.call import in_pieces
from cfmerge.planning.arithmetic import arithmetic
from cfmerge.planning.prediction import Devices, Limits, Rates, predicted
from cfmerge.planning.tally import tally

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from make_headers import LLAMA, family, llama

ONES = Rates(**dict.fromkeys(Rates._fields, 1000000000.0) | {"cores": 2, "on_host": True, "start": 2.0, "memory": 1e8})
LIMITS = Limits(entries=lambda job: 1 << 22, stacked=1 << 18, workers=2, behind=8, memory=6e9, free=1e12)
HERE = Devices()


@pytest.fixture
def giants(tmp_path, monkeypatch):
    """`giants(method, experts)`: the plan of a few layers of Llama 405B, from headers."""
    family(tmp_path, "llama-405b", 4, layers=1)

    def planned(method="ace", experts=2):
        return cfmerge.plan(tmp_path / "base", [tmp_path / f"expert_{number}" for number in range(experts)], method)

    return planned


def resident_files():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


# --- the count of operations ------------------------------------------------------------------------------------------


def test_operations_are_counted_by_kind():
    a, b = jnp.zeros((6, 4)), jnp.zeros((4, 5))
    assert tally(linalg.matmul, a, b).products == 2 * 6 * 4 * 5
    square = jnp.eye(8)
    assert tally(linalg.symmetric_eigen, square).eigen == 8**3
    assert tally(linalg.thin_svd, jnp.zeros((9, 4))).svd == 9 * 4 * 4
    solved = tally(linalg.solve_right, jnp.zeros((3, 8)), square)
    assert solved.solves == pytest.approx(8**3 / 3 + 2 * 3 * 8 * 8)
    assert solved.eigen == 0  # the way out, where Cholesky fails
    assert tally(lambda x: x + 1, jnp.zeros(7)).entries == 7


def test_a_loop_counts_every_round_and_holds_memory_once():
    def once(x):
        return linalg.matmul(x, x)

    def five(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: once(x), x)

    x = jnp.zeros((16, 16))
    assert tally(five, x).products == 5 * tally(once, x).products
    assert tally(five, x).memory <= 2 * tally(once, x).memory


def test_memory_counts_what_is_there_at_once():
    x = jnp.zeros((16, 16))
    size = 4 * x.size
    assert tally(lambda x: x * 2 + 1, x).memory == 2 * size  # one loop: its input and its output
    chained = tally(lambda x: linalg.matmul(linalg.matmul(linalg.matmul(x, x), x), x), x)
    assert 3 * size <= chained.memory <= 4 * size  # a product that was used is forgotten


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "sce", "karcher", "della", "dare_ties", "lot"])
def test_looks_and_steps_are_counted_for_methods_of_every_kind(name):
    method = methods.make(name)
    method = in_pieces(method) if method.pieces else method
    few, many = (arithmetic(method, (64, 48), count) for count in (2, 4))
    assert many.merge.entries > few.merge.entries
    assert bool(few.looks) == (method.survey is not None)
    assert all(after.tally.entries > before.tally.entries for before, after in zip(few.looks, many.looks, strict=True))


# --- predictions ------------------------------------------------------------------------------------------------------


def test_experts_add_reading_and_arithmetic(giants):
    two, four = (predicted(giants(experts=count), ONES, LIMITS, HERE) for count in (2, 4))
    assert four.parts["reading"] == pytest.approx(two.parts["reading"] * 5 / 3)
    assert four.parts["hashing"] == pytest.approx(two.parts["hashing"] * 5 / 3)
    assert four.parts["writing"] == two.parts["writing"]
    assert four.parts["arithmetic"] > two.parts["arithmetic"]
    assert four.seconds > two.seconds > ONES.start


def test_files_that_do_not_stay_in_memory_come_from_the_disk_in_every_pass(giants):
    plan = giants("ties")
    fits, not_so = (predicted(plan, ONES, LIMITS._replace(free=free), HERE) for free in (1e13, 1e9))
    inputs = sum(info.nbytes for model in (plan.base, *plan.experts) for info in model.tensors.values())
    assert not_so.parts["disk"] - fits.parts["disk"] == pytest.approx(3 * inputs / ONES.disk)  # look, merge, SHA-256


def test_a_faster_machine_takes_less(giants):
    plan = giants()
    slow = predicted(plan, ONES, LIMITS, HERE)
    fast = predicted(plan, ONES._replace(product=1e12), LIMITS, HERE)
    assert fast.seconds < slow.seconds
    assert fast.memory == slow.memory


def test_devices_divide_the_work_and_a_large_matrix(giants):
    plan = giants()
    one, eight = (predicted(plan, None, LIMITS, Devices(count, None, on_host=False)) for count in (1, 8))
    assert eight.device_flops == pytest.approx(one.device_flops / 8)
    assert eight.device_memory < one.device_memory
    assert one.seconds is None


def test_a_device_that_is_too_small_is_told_with_the_tensor(giants):
    told = giants().prediction(devices=8, device_memory="4GB").too_large
    assert "model.layers.0.mlp.down_proj.weight" in told
    assert all(need > 4e9 for need in told.values())
    assert giants("average").prediction(devices=8, device_memory="4GB").too_large == {}


def test_memory_of_what_is_merged_in_pieces_does_not_depend_on_the_tensor(giants):
    plan = giants("sce")
    assert plan.forecast("1GB", None, None, False).refused == {}
    assert predicted(plan, None, LIMITS, HERE).memory < 1e9


def test_tensors_that_a_bound_of_memory_refuses_are_told_before_anything_is_read(giants, tmp_path):
    plan = giants()
    refused = plan.forecast("1GB", None, None, False).refused
    assert "model.layers.0.mlp.down_proj.weight" in refused
    with pytest.raises(cfmerge.CfmergeError, match="MiB with ace"):
        plan.run(tmp_path / "out", memory="1GB")


# --- from headers alone -----------------------------------------------------------------------------------------------


def test_a_giant_is_planned_without_its_tensors(giants):
    before = resident_files()
    plan = giants(experts=4)
    told = plan.prediction(calibrate=False)
    assert plan.bytes_to_read > 5e10
    assert resident_files() - before < 2e8
    assert told.memory > 1e9


@pytest.mark.long
@pytest.mark.parametrize("model", [*LLAMA, "deepseek-671b"])
def test_models_of_up_to_671b_are_planned_without_their_tensors(tmp_path, model):
    family(tmp_path, model, 2)
    before = resident_files()
    plan = cfmerge.plan(tmp_path / "base", [tmp_path / "expert_0", tmp_path / "expert_1"], "ace")
    told = plan.prediction(devices=8, device_memory="80GB")
    assert told.device_memory > 5e8  # of a matrix, whose experts come with it
    assert resident_files() - before < 1e9


def test_the_headers_are_those_of_the_models():
    sizes = {name: sum(_size(shape) for shape in llama(name)[1].values()) for name in LLAMA}
    assert {name: round(size / 1e9) for name, size in sizes.items()} == {
        "llama-8b": 8,
        "llama-70b": 71,
        "llama-405b": 406,
    }


def _size(shape):
    size = 1
    for length in shape:
        size *= length
    return size
