"""Units: every entry in one of them, few shapes to compile, and layers of a stack some at a time."""

import collections

import numpy as np
import pytest

import cfmerge
from cfmerge.engine import cutting, run, steps
from cfmerge.formats.huggingface import HuggingFaceSource
from cfmerge.products.leaves import Kept

ODD = {f"layer{n}.weight": shape for n, shape in enumerate([(3, 5), (7, 2), (4, 4), (1, 9), (40, 3)])}
ODD |= {f"layer{n}.bias": (n + 2,) for n in range(4)}


@pytest.fixture
def odd(make_model, tmp_path):
    def tensors(seed):
        rng = np.random.default_rng(seed)
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in ODD.items()}

    paths = [make_model(tmp_path / f"m{n}", tensors(n), None) for n in range(3)]
    return paths[0], paths[1:]


@pytest.mark.parametrize("entries", [16, 24, 1 << 22])
def test_rows_hold_every_entry_once(odd, monkeypatch, entries):
    monkeypatch.setattr(cutting, "ENTRIES", entries)
    plan = cfmerge.plan(*odd, "average")
    seen = collections.Counter()
    for unit in cutting.units_of(plan.work, plan.work.merged):
        assert unit.base().shape == (unit.stack, unit.row)
        flat = unit.base()
        for (job, first, values), segment in zip(unit.parts(flat), unit.segments, strict=True):
            whole = plan.base.read(job.name).reshape(-1)
            np.testing.assert_array_equal(values, whole[first : first + segment.count])
            seen.update((job.name, first + n) for n in range(segment.count))
    assert set(seen.values()) == {1}
    assert len(seen) == sum(int(np.prod(shape)) for shape in ODD.values())


@pytest.mark.parametrize("method", ["average", "dare_ties"])
def test_entrywise_methods_are_compiled_once_whatever_the_shapes(odd, tmp_path, method):
    steps.compiled.cache_clear()
    cfmerge.merge(*odd, method, output=tmp_path / "out")
    compiled = steps.compiled("", "float32", True, None)
    assert compiled.step._cache_size() + compiled.together._cache_size() == 1


MIXTURE = {"experts.gate_up_proj": (4, 6, 10), "experts.down_proj": (4, 5, 6), "norm.weight": (6,)}


def test_layers_of_a_stack_are_merged_some_at_a_time(make_model, tmp_path, load, monkeypatch):
    """All at once, one at a time, and in the least memory: the same bytes."""

    def tensors(seed):
        rng = np.random.default_rng(seed)
        return {f"model.layers.0.mlp.{n}": rng.standard_normal(s).astype(np.float32) for n, s in MIXTURE.items()}

    base, *experts = [make_model(tmp_path / f"m{n}", tensors(n), {"hidden_size": 6}) for n in range(3)]
    cfmerge.merge(base, experts, "ace", output=tmp_path / "whole")
    plan = cfmerge.plan(base, experts, "ace")
    job = next(job for job in plan.jobs if job.name.endswith("gate_up_proj"))
    assert job.layers_apart
    assert job.method.name == "ace"
    monkeypatch.setattr(cutting, "STACKED", 1)
    assert [len(unit.layers) for unit in cutting.units_of(plan.work, [job])] == [1] * 4
    cfmerge.merge(base, experts, "ace", output=tmp_path / "cut", memory=max(job.working_bytes for job in plan.jobs))
    whole, cut = load(tmp_path / "whole"), load(tmp_path / "cut")
    assert all(np.array_equal(whole[name], cut[name]) for name in whole | cut)
    cfmerge.accumulate(base, experts, "ace", output=tmp_path / "sums")
    cfmerge.solve(tmp_path / "sums", base, output=tmp_path / "solved")
    for name, tensor in load(tmp_path / "solved").items():
        np.testing.assert_allclose(tensor, whole[name], atol=1e-4)


def test_sources_are_prepared_once_and_before_they_are_read(odd, monkeypatch):
    told = []
    original = HuggingFaceSource.read

    def read(self, name, first=0, count=None):
        told.append(("read", self.path))
        return original(self, name, first, count)

    base, experts = odd
    plan = cfmerge.plan(base, experts, "average")
    monkeypatch.setattr(HuggingFaceSource, "prepare", lambda self: told.append(("prepare", self.path)))
    monkeypatch.setattr(HuggingFaceSource, "read", read)
    run.merge(plan.work, [Kept()])
    assert told[:3] == [("prepare", path) for path in (base, *experts)]
    assert {kind for kind, _ in told[3:]} == {"read"}


# --- layers stacked along an axis that is not the first -------------------------------------------------------------

L, D, N, H, F = 5, 6, 2, 4, 3
MAXTEXT = {  # the layers on the second axis, as MaxText has them; and of experts two stacked axes
    "decoder.layers.attention.query.kernel": (D, L, N, H),
    "decoder.layers.attention.out.kernel": (N, L, H, D),
    "decoder.layers.MoeBlock_0.wo": (2, L, F, D),
    "decoder.layers.norm.scale": (D, L),
}


@pytest.fixture
def strided(make_model, tmp_path):
    def tensors(seed):
        rng = np.random.default_rng(seed)
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in MAXTEXT.items()}

    paths = [make_model(tmp_path / f"m{n}", tensors(n), None) for n in range(3)]
    return paths[0], paths[1:]


def test_layers_of_any_axis_are_merged_some_at_a_time(strided, tmp_path, load, monkeypatch):
    """All at once, two at a time, and one at a time in the least memory: the same bytes."""
    base, experts = strided
    cfmerge.merge(base, experts, "ace", output=tmp_path / "whole")
    whole = load(tmp_path / "whole")
    plan = cfmerge.plan(base, experts, "ace")
    jobs = [job for job in plan.work.merged if job.method.name == "ace"]
    assert {job.matrices for job in jobs} == {L, 2 * L}
    assert not any(unit.at_once for unit in cutting.units_of(plan.work, jobs))
    least = max(job.working_bytes for job in plan.jobs)
    for size, memory in ((96, None), (1, least)):
        monkeypatch.setattr(cutting, "STACKED", size)
        units = list(cutting.units_of(plan.work, jobs, memory))
        counts = {unit.job.name.split(".")[-2]: [len(piece.layers) for piece in unit.pieces] for unit in units}
        assert counts["query"] == ([2, 2, 1] if size > 1 else [1] * L)
        assert counts["MoeBlock_0"] == ([5, 5] if size > 1 else [1] * 2 * L)
        assert max(unit.working_bytes for unit in units) <= (memory or 1 << 30)
        cfmerge.merge(base, experts, "ace", output=tmp_path / f"cut{size}", memory=memory)
        cut = load(tmp_path / f"cut{size}")
        assert all(np.array_equal(whole[name], cut[name]) for name in whole | cut)


def test_statistics_and_surveys_of_layers_of_any_axis(strided, tmp_path, load, monkeypatch):
    base, experts = strided
    method = "ace >> lines(alpha=0.5, beta=0.5)"
    cfmerge.merge(base, experts, "ace", output=tmp_path / "whole")
    cfmerge.merge(base, experts, method, output=tmp_path / "surveyed")
    monkeypatch.setattr(cutting, "STACKED", 1)
    cfmerge.merge(base, experts, method, output=tmp_path / "surveyed cut")
    cfmerge.accumulate(base, experts, "ace", output=tmp_path / "sums")
    cfmerge.solve(tmp_path / "sums", base, output=tmp_path / "solved")
    for one, other in (("whole", "solved"), ("surveyed", "surveyed cut")):
        first, second = load(tmp_path / one), load(tmp_path / other)
        for name in MAXTEXT:
            np.testing.assert_allclose(first[name], second[name], atol=1e-4)


def test_layers_of_any_axis_in_memory(strided, load, monkeypatch):
    base, experts = load(strided[0]), [load(path) for path in strided[1]]
    whole = cfmerge.merge_params(base, experts, "ace")
    monkeypatch.setattr(cutting, "STACKED", 1)
    cut = cfmerge.merge_params(base, experts, "ace")
    assert all(np.array_equal(whole[name], cut[name]) for name in whole)
