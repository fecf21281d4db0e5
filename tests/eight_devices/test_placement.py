"""Merges of files over several devices: the same result, each device with its share, and sums of parts where one
matrix is shared out."""

import contextlib
import re
from types import SimpleNamespace

import adapter_parts
import jax
import numpy as np
import pytest
import toys
from every_part import PARTS, count, moments_of, text_of
from safetensors.numpy import save_file

import cfmerge
from cfmerge import methods
from cfmerge.engine import cutting, low_rank, placement, precision, run
from cfmerge.engine.inputs import INPUTS
from cfmerge.engine.passes import Additive
from cfmerge.engine.placement import placement_of
from cfmerge.engine.precision import Attempt
from cfmerge.engine.spread import Spread, mesh_of
from cfmerge.engine.steps import compiled
from cfmerge.linalg import ROWS

UP = "model.layers.{}.mlp.up_proj.weight"
TOLERANCE = {  # of the largest entry of a merged delta, in float32, where it is more than 1e-4
    "cauchy_poe": 1e-3,  # its weights are quotients of small residuals
}


@pytest.fixture
def every_matrix_is_large(monkeypatch):
    """Each matrix is a unit, and one that can be shared out."""
    for module in (cutting, placement):
        monkeypatch.setattr(module, "STACKED", 1)


def models(make_model, directory, shapes, experts=3, dtype=np.float32, scale=0.05, common=0.0):
    """Models on disk of tensors of these shapes: `.base`, `.experts`, `.deltas` by expert."""
    rng = np.random.default_rng(3)
    base = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    shared = {n: common * np.random.default_rng(4).standard_normal(shape) for n, shape in shapes.items()}
    tuned = [
        {n: (array + scale * (shared[n] + rng.standard_normal(array.shape))).astype(dtype) for n, array in base.items()}
        for _ in range(experts)
    ]
    paths = [make_model(directory / f"m{n}", tensors, None) for n, tensors in enumerate([base, *tuned])]
    deltas = [{name: array - base[name] for name, array in tensors.items()} for tensors in tuned]
    return SimpleNamespace(base=paths[0], experts=paths[1:], tensors=base, deltas=deltas)


def merged(family, load, method, output, devices, **options):
    """`{tensor: merged delta}`."""
    result = cfmerge.merge(family.base, family.experts, method, output=output, devices=devices, **options)
    found = load(result.output)
    return {name: found[name].astype(np.float64) - family.tensors[name] for name in found}


def differ(one, other):
    """How much two merges differ, relative to the largest entry of each tensor's merged delta."""
    return max(np.max(np.abs(one[name] - other[name])) / np.max(np.abs(one[name])) for name in one if one[name].any())


# --- the same result ----------------------------------------------------------------------------------------------

SEVERAL = {**{UP.format(n): (16, 8) for n in range(3)}, "model.norm.weight": (8,)}


@pytest.mark.parametrize(
    "method", ["ace", "ties", *(pytest.param(m, marks=pytest.mark.long) for m in ("tsv_m", "dare_ties"))]
)
def test_the_same_on_one_two_and_eight_devices(make_model, tmp_path, load, every_matrix_is_large, method):
    """Three matrices on two devices are two and one; on eight each is shared out, or the stack filled up."""
    family = models(make_model, tmp_path, SEVERAL)
    one, two, eight = (merged(family, load, method, tmp_path / f"on{n}", n) for n in (1, 2, 8))
    assert differ(one, two) < 1e-5
    assert differ(one, eight) < 1e-5
    assert all(delta.any() for delta in one.values())
    if method != "ace":  # units solved whole: the same bits
        assert all(np.array_equal(one[name], eight[name]) for name in one)


def test_numbers_and_findings_keep_64_bits_on_several_devices(make_model, tmp_path, load, every_matrix_is_large):
    family = models(make_model, tmp_path, SEVERAL, 3, np.dtype("float64"))
    one, two = (merged(family, load, "trim(density=0.3) >> task_arithmetic", tmp_path / f"on{n}", n) for n in (1, 2))
    assert differ(one, two) < 1e-12


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.usefixtures("every_matrix_is_large")
def test_every_method_is_the_same_on_one_two_and_eight_devices(make_model, tmp_path, load, part, dtype):
    method = methods.make(text_of(part))
    common = 1.0 if part == "model_stock" else 0.0  # which leaves nothing of deltas that point away from each other
    family = models(make_model, tmp_path, SEVERAL, count(method), np.dtype(dtype), common=common)
    rules = []
    if method.needs.moments == "input_gram":  # a vector has no inputs
        rules = [{"match": "model.norm.weight", "method": "average"}]
    family.experts = [
        cfmerge.Expert(str(path), moments=moments_on_disk(method, deltas, tmp_path / f"{path.name}.safetensors"))
        for path, deltas in zip(family.experts, family.deltas, strict=True)
    ]
    one, *others = (merged(family, load, text_of(part), tmp_path / f"on{n}", n, rules=rules) for n in (1, 2, 8))
    assert any(delta.any() for delta in one.values())
    for other in others:
        assert differ(one, other) < (1e-6 if dtype == "float64" else TOLERANCE.get(part, 1e-4))


def moments_on_disk(method, deltas, path):
    """The file of the measurements that a method needs of an expert; nothing if it needs none."""
    fisher = method.needs.moments == "fisher"
    wanted = {name: delta for name, delta in deltas.items() if method.needs.moments and (fisher or delta.ndim == 2)}
    each = {name: moments_of(method, np.atleast_2d(delta)[None])[0] for name, delta in wanted.items()}
    if not each:
        return ""
    shaped = {name: moment.reshape(wanted[name].shape) if fisher else moment for name, moment in each.items()}
    save_file({name: moment.astype(np.float32) for name, moment in shaped.items()}, path)
    return str(path)


@pytest.mark.parametrize("text", ["average >> restore", "unit >> average", "share(by='place') >> average"])
def test_surveys_do_not_count_what_fills_the_mesh_up(make_model, tmp_path, load, text):
    """Sums over the model by expert, of all experts jointly, and by tensor: three matrices on eight devices."""
    with toys.registered(toys.unit, toys.restore, toys.share):
        family = models(make_model, tmp_path, {UP.format(n): (16, 8) for n in range(3)})
        one, eight = (merged(family, load, text, tmp_path / f"on{n}", n) for n in (1, 8))
    assert differ(one, eight) < 1e-5


MIXTURE = {"experts.gate_up_proj": (10, 6, 10), "experts.down_proj": (10, 5, 6), "norm.weight": (6,)}


@pytest.mark.usefixtures("every_matrix_is_large")
def test_layers_of_a_stacked_tensor_are_joined(make_model, tmp_path, load, monkeypatch):
    """Ten experts of a mixture on eight devices, with draws of each layer's own; and their statistics."""
    shapes = {f"model.layers.0.mlp.{name}": shape for name, shape in MIXTURE.items()}
    family = models(make_model, tmp_path, shapes, 2)
    joined = []
    monkeypatch.setattr(
        placement, "_joined", lambda units, make=placement._joined: joined.append(len(units)) or make(units)
    )
    one, eight = (merged(family, load, "della_linear", tmp_path / f"on{n}", n) for n in (1, 8))
    assert differ(one, eight) < 1e-6
    assert joined
    joined.clear()
    for n in (1, 8):
        cfmerge.accumulate(family.base, family.experts, "ace", output=tmp_path / f"sums{n}", devices=n)
        cfmerge.solve(tmp_path / f"sums{n}", family.base, output=tmp_path / f"solved{n}", devices=n)
    assert 8 in joined
    one, eight = (load(tmp_path / f"solved{n}") for n in (1, 8))
    for name in one:
        np.testing.assert_allclose(one[name], eight[name], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("every_matrix_is_large")
def test_layers_of_any_axis_are_joined(make_model, tmp_path, load, monkeypatch):
    """Ten layers on the second axis, one at a time: eight devices, and then two of them."""
    shapes = {"decoder.layers.up.kernel": (12, 10, 7), "decoder.layers.norm.scale": (12, 10)}
    family = models(make_model, tmp_path, shapes, 2)
    monkeypatch.setattr("cfmerge.engine.cutting.STACKED", 1)
    joined = []
    monkeypatch.setattr(
        placement, "_joined", lambda units, make=placement._joined: joined.append(len(units)) or make(units)
    )
    one, eight = (merged(family, load, "ace", tmp_path / f"on{n}", n) for n in (1, 8))
    assert differ(one, eight) < 1e-5
    assert 8 in joined


@pytest.mark.usefixtures("every_matrix_is_large")
def test_a_sweep_is_the_same_on_eight_devices(make_model, tmp_path, load):
    family = models(make_model, tmp_path, {UP.format(n): (16, 8) for n in range(3)})
    grid = cfmerge.grid("ace", eps_rel=[0.05, 0.5])
    for n in (1, 8):
        cfmerge.sweep(family.base, family.experts, grid, output=tmp_path / f"on{n}", devices=n)
    for label in grid:
        one, eight = (load(tmp_path / f"on{n}" / label.replace("(", "_").rstrip(")")) for n in (1, 8))
        for name in one:
            np.testing.assert_allclose(one[name], eight[name], rtol=0, atol=1e-5)


def test_deltas_of_low_rank_are_found_in_joined_units(make_model, tmp_path, load, monkeypatch):
    """And one that looks like it but is not is merged in full, as on one device."""
    for module, name, value in [
        (cutting, "STACKED", 1), (placement, "STACKED", 1), (low_rank, "LEAST_INPUTS", 64),
        (precision, "LEAST_INPUTS", 64), (low_rank, "BLOCK", 8), (low_rank, "LARGEST", 6),
    ]:  # fmt: skip
        monkeypatch.setattr(module, name, value)
    rng = np.random.default_rng(0)
    shapes = {UP.format(n): (64, 64) for n in range(9)}
    base = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}

    def tuned():
        low = {name: rng.standard_normal((64, 2)) @ rng.standard_normal((2, 64)) for name in shapes}
        low[UP.format(4)][1::9] += rng.standard_normal(low[UP.format(4)][1::9].shape)  # no row that is looked at
        return {name: array.astype(np.float32) for name, array in low.items()}

    base_path, *experts = [make_model(tmp_path / f"m{n}", t, None) for n, t in enumerate([base, tuned(), tuned()])]
    family = SimpleNamespace(base=base_path, experts=experts, tensors=base)
    seen = []
    original = precision.rank_bound
    monkeypatch.setattr(precision, "rank_bound", lambda *of: seen.append(original(*of)) or seen[-1])
    one = merged(family, load, "ace", tmp_path / "on1", 1)
    assert 16 in seen
    eight = merged(family, load, "ace", tmp_path / "on8", 8)
    assert differ(one, eight) < 1e-4


# --- where it lies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ace", *(pytest.param(m, marks=pytest.mark.long) for m in ("tsv_m", "dare_ties"))])
def test_no_device_holds_over_a_quarter_of_a_stack(make_model, tmp_path, monkeypatch, every_matrix_is_large, method):
    family = models(make_model, tmp_path, {UP.format(n): (16, 8) for n in range(9)})
    stored, shares = Spread.stored, []

    def recorded(self, array):
        placed = stored(self, array)
        assert len(placed.sharding.device_set) == 8
        shares.append(max(shard.data.size for shard in placed.addressable_shards) / placed.size)
        return placed

    monkeypatch.setattr(Spread, "stored", recorded)
    cfmerge.merge(family.base, family.experts, method, output=tmp_path / "out", devices=8)
    assert shares
    assert max(shares) <= 1 / 4


@contextlib.contextmanager
def one_large(make_model, directory, shape, experts=2):
    """The additive steps of ACE for one matrix on eight devices, with all that they are called with."""
    family = models(make_model, directory, {UP.format(0): shape}, experts)
    work = cfmerge.plan(family.base, family.experts, "ace").work
    (unit,) = placement_of(8).grouped(cutting.units_of(work, work.merged))
    spread = placement_of(8).spread(unit)
    assert spread.kind == "rows"
    each = Additive(Attempt(unit, unit.methods, None, "float32"), spread)
    base = spread.stored(unit.base())
    with jax.set_mesh(mesh_of(spread.devices, ROWS)):
        plain = compiled(unit.job.layout, "float32")
        state, programs = plain.start(each.settings[0], base), []
        for number in each.experts:
            expert, inputs = spread.stored(unit.expert(number)[0]), spread.put(unit.inputs(number), INPUTS)
            arguments = each.settings[each.order[number]], state, base, expert, inputs
            programs.append(plain.step.lower(*arguments).compile().as_text())
            state, _ = plain.step(*arguments)
        finish = plain.finish.lower(each.settings[0], state, base, "float32").compile().as_text()
    yield SimpleNamespace(steps=programs, finish=finish, state=state)


def test_the_gram_of_a_shared_matrix_is_a_sum_of_parts(make_model, tmp_path, every_matrix_is_large):
    m, n = 64, 24
    with one_large(make_model, tmp_path, (m, n)) as made:
        for program in made.steps:
            assert "all-reduce" in program
            assert not whole(program, "all-gather", m, n)
        sums = made.state.sums
        for array in (sums.cross, sums.total, sums.scaled_cross):
            assert {shard.data.shape[1:] for shard in array.addressable_shards} == {(m // 8, n)}
        solves = [line for line in made.finish.splitlines() if "lapack_strsm" in line and "custom-call(" in line]
        assert solves
        for line in solves:  # the right-hand sides, and one row of ones
            assert f"f32[{m // 8 + 1},{n}]" in line
            assert not re.search(rf"f32\[{m + 1},", line)


def test_rows_that_are_kept_are_shared_out_by_columns(make_model, tmp_path, every_matrix_is_large):
    m, n = 8, 64
    with one_large(make_model, tmp_path, (m, n)) as made:
        kept = [rows.right for rows in made.state.sums]
        assert {shard.data.shape[1:] for array in kept for shard in array.addressable_shards} == {(m, n // 8)}
        assert "all-reduce" in made.finish
        assert not whole(made.finish, "all-gather", 2 * m, n)


def whole(program, operation, m, n):
    """Lines of a compiled program whose operation gives a matrix of `m` times `n`."""
    return re.findall(rf"= f32\[(?:1,)?(?:{m},{n}|{n},{m})\][^=]*\b{operation}\(", program)


# --- how units are joined -----------------------------------------------------------------------------------------


def grouped(family, method, devices=8, memory=None):
    work = cfmerge.plan(family.base, family.experts, method).work
    where = placement_of(devices).within(memory)
    units = list(where.grouped(cutting.units_of(work, work.merged, memory)))
    return work, [(unit, where.spread(unit).kind) for unit in units]


def test_joined_units_hold_every_segment_once(make_model, tmp_path, every_matrix_is_large):
    family = models(make_model, tmp_path, {UP.format(n): (16, 8) for n in range(11)} | {"model.norm.weight": (8,)})
    work, units = grouped(family, "tsv_m")
    alone = [segment for unit in cutting.units_of(work, work.merged) for segment in unit.segments]
    joined = [segment for unit, _ in units for segment in unit.segments]
    assert sorted((s.job.name, s.first) for s in joined) == sorted((s.job.name, s.first) for s in alone)
    assert [len(unit.segments) for unit, _ in units if unit.row is None] == [8, 3]


def test_matrices_that_would_leave_devices_idle_are_shared_out(make_model, tmp_path, every_matrix_is_large):
    """Eight are joined, the other three go one by one; those of a method that cannot are joined too."""
    family = models(make_model, tmp_path, {UP.format(n): (16, 8) for n in range(11)})
    assert [(len(unit.segments), kind) for unit, kind in grouped(family, "ace")[1]] == [
        (8, "stack"), (1, "rows"), (1, "rows"), (1, "rows"),
    ]  # fmt: skip
    assert [(len(unit.segments), kind) for unit, kind in grouped(family, "iso_c")[1]] == [(8, "stack"), (3, "stack")]


def test_a_matrix_larger_than_a_device_is_shared_out(make_model, tmp_path, every_matrix_is_large, monkeypatch):
    family = models(make_model, tmp_path, {UP.format(n): (16, 8) for n in range(8)})
    monkeypatch.setattr(placement, "memory_of", lambda device: 1000)
    assert [kind for _, kind in grouped(family, "ace")[1]] == ["rows"] * 8


def test_rows_that_eight_devices_do_not_divide_stay_whole(make_model, tmp_path, every_matrix_is_large):
    family = models(make_model, tmp_path, {UP.format(0): (12, 6)})
    assert [kind for _, kind in grouped(family, "ace")[1]] == ["stack"]


def test_the_bound_of_memory_is_that_of_all_devices_of_a_processor(
    make_model, tmp_path, load, every_matrix_is_large, monkeypatch
):
    """What does not fit eight times is done by one device."""
    family = models(make_model, tmp_path, {UP.format(n): (16, 8) for n in range(9)})
    needed = max(job.working_bytes for job in cfmerge.plan(family.base, family.experts, "tsv_m").jobs)
    assert {kind for _, kind in grouped(family, "tsv_m", memory=4 * needed)[1]} == {"one"}
    assert {kind for _, kind in grouped(family, "tsv_m", memory=100 * needed)[1]} == {"stack"}
    much, little = (merged(family, load, "tsv_m", tmp_path / f"{m}", 8, memory=m * needed) for m in (100, 4))
    assert all(np.array_equal(much[name], little[name]) for name in much)


# --- what users ask for -------------------------------------------------------------------------------------------


def test_devices_by_name_and_number():
    assert len(placement_of("all").devices) == 8
    assert len(placement_of(3).devices) == len(placement_of("3").devices) == 3
    assert len(placement_of("cpu").devices) == len(placement_of(None).devices) == 1  # a processor: if asked only


@pytest.mark.parametrize(("devices", "words"), [
    (9, "9 are wanted, but JAX has 8 (cpu), and their number is settled when JAX is first used: set "
        "JAX_NUM_CPU_DEVICES=9"),
    ("some", "expected 'all', 'cpu' or a number of devices, found 'some'"), (0, "found 0"), (-1, "found -1"),
])  # fmt: skip
def test_devices_that_there_are_not(refused, make_model, tmp_path, devices, words):
    family = models(make_model, tmp_path, {UP.format(0): (4, 2)})
    refused([words], family.base, family.experts, devices=devices)


def test_trees_say_themselves_where_they_lie():
    tree = {"weight": np.zeros((2, 2), np.float32)}
    for call in (
        lambda: cfmerge.sweep(tree, [tree], ["average"], devices=2),
        lambda: cfmerge.accumulate(tree, [tree], "average", devices=2),
    ):
        with pytest.raises(cfmerge.CfmergeError, match="arrays lie where their sharding says"):
            call()


def test_trees_in_memory_stay_where_jax_puts_them():
    assert run.ANYWHERE.devices == ()


@pytest.mark.parametrize("method", ["average", pytest.param("ace", marks=pytest.mark.long)])
def test_devices_share_out_the_adapters_of_alike_tensors(method):
    _, factored = adapter_parts.works(method, adapter_parts.ADAPTERS, "float32")
    (one,), (eight,) = (adapter_parts.merged(factored, placement=placement_of(count))[0] for count in (1, 8))
    for name in adapter_parts.SHAPES:
        np.testing.assert_allclose(eight[name], one[name], rtol=0, atol=1e-6, err_msg=name)
