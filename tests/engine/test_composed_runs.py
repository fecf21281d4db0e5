"""Composed results made as merges are: stopped and gone on with, of adapters, by several processes."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from adapter_parts import SHAPES, Adapter, tensors
from composed_parts import SYSTEMS, models, truncated
from resuming import left

from cfmerge import compose
from cfmerge.compose.kept import entry_of
from cfmerge.compose.systems import choice
from cfmerge.compose.trees import KeptParts
from cfmerge.engine import run
from cfmerge.methods import make
from cfmerge.models import classify
from cfmerge.planning.assign import assign
from cfmerge.planning.jobs import with_ranks
from cfmerge.products.trees import work_of

NAMES = ("m1", "m2", "m3")


def built(family, output, system, **options):
    return compose.build(family.base, dict(zip(NAMES, family.experts, strict=True)), system, output=output, **options)


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_result_that_was_stopped_goes_on_to_the_same_bytes(family, tmp_path, contents, stop, go_on, system):
    rules = [{"match": "*lm_head*", "method": "keep-base"}]
    whole = built(family, tmp_path / "whole" / "out", system, rules=rules)
    stop(4)
    with pytest.raises(KeyboardInterrupt):
        built(family, tmp_path / "out", system, rules=rules)
    assert len(left(tmp_path)) == 1
    reads = go_on()
    planned = compose.plan(family.base, dict(zip(NAMES, family.experts, strict=True)), system, rules=rules)
    result = planned.run(tmp_path / "out")
    assert "is not done again" in result.resumed[0]
    assert reads
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")
    assert left(tmp_path) == []
    assert whole.tasks == NAMES


@pytest.mark.parametrize("wrong", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_rank_by_share_is_settled_again_without_an_expert_that_is_not_finite(tmp_path, make_model, wrong):
    tensors = models(3)
    tensors[3][wrong].reshape(-1)[0] = np.nan
    for name, own in zip(("base", *NAMES), tensors, strict=True):
        make_model(tmp_path / name, own, None)
    system = "smile(rank=0.7, gate=2, others='mean')"
    paths = {name: tmp_path / name for name in NAMES}
    left_out = compose.build(tmp_path / "base", paths, system, output=tmp_path / "x", on_nonfinite="skip-expert")
    assert "m3" in (tmp_path / "x" / "README.md").read_text()
    del paths["m3"]
    alone = compose.build(tmp_path / "base", paths, system, output=tmp_path / "y")
    assert left_out.tasks == alone.tasks == NAMES[:2]
    assert left_out.about.entries == alone.about.entries


def composed(system, adapters):
    """The parts that experts with factors make, and those that the same deltas make as tensors."""
    base = tensors(0, "float64")
    parameters = classify({name: (shape, "float64") for name, shape in SHAPES.items()})
    method = make(system)
    assignments = [assign(parameters, method, choose=choice(len(adapters), method))]
    experts = [{name: adapter.tensor(name, base[name]) for name in base} for adapter in adapters]
    dense = work_of(assignments, [base, *experts], ["a", "b", "c"], None, [None] * 3, 0)
    own = tuple(_with(one, adapter) for one, adapter in zip(dense.experts, adapters, strict=True))
    factored = _with(dense, None, experts=own, jobs=tuple(with_ranks(dense.jobs, own)))
    made = []
    for work in (dense, factored):
        entries = {job.name: entry_of(job) for job in work.merged}
        sink = KeptParts(entries)
        run.merge(work, [sink])
        made.append(sink.arrays())
    return (*made, factored)


def _with(one, adapter, **changes):
    import dataclasses

    return dataclasses.replace(one, **changes or {"tensors": adapter})


@pytest.mark.parametrize("system", ["smile(rank=2, gate=3)", "tsv_c(ratio=0.1)"])
def test_adapters_enter_as_factors_and_give_what_their_deltas_give(system):
    adapters = [Adapter(1), Adapter(2), Adapter(3)]
    dense, factored, work = composed(system, adapters)
    joint = [job.name for job in work.merged if job.joint is not None]
    assert "layers.0.up.weight" in joint
    for name in joint:
        up, down = (np.asarray(factored[name][part], np.float64) for part in ("up", "down"))
        theirs = np.asarray(dense[name]["up"], np.float64) @ np.asarray(dense[name]["down"], np.float64)
        np.testing.assert_allclose(up @ down, theirs, atol=1e-6 * np.abs(theirs).max())
        if "router" in factored[name]:
            x = np.random.default_rng(0).standard_normal(down.shape[-1])
            ours, others = (np.linalg.norm(np.asarray(own[name]["router"]) @ x, axis=-1) for own in (factored, dense))
            np.testing.assert_allclose(ours, others, rtol=1e-5)


def test_of_adapters_the_expert_is_the_leading_part_of_the_product():
    _, factored, _ = composed("smile(rank=2, gate=3)", [Adapter(1), Adapter(2), Adapter(3)])
    up, down = (np.asarray(factored["layers.0.up.weight"][part], np.float64) for part in ("up", "down"))
    expected = truncated(Adapter(2).delta("layers.0.up.weight").product, 2)
    np.testing.assert_allclose(up[1] @ down[1], expected, atol=1e-5)


WORKER = """
import json, sys
asked = json.loads(sys.argv[1])
from cfmerge import compose
from cfmerge.engine import cutting
from cfmerge.products.processes import joined_by
cutting.ENTRIES, cutting.STACKED = 128, 64
joined_by(f"127.0.0.1:{asked['port']}", "2", asked["number"], "cpu")
for system, output in asked["systems"]:
    compose.plan(asked["base"], asked["experts"], system).run(output, devices="cpu")
"""


@pytest.mark.parametrize(
    "systems", [SYSTEMS[:1], pytest.param([*SYSTEMS[1:], "smile(rank=0.6, gate=2)"], marks=pytest.mark.long)]
)
@pytest.mark.usefixtures("small_units")
def test_two_processes_write_the_bytes_of_one(family, tmp_path, contents, systems):
    from test_several_processes import free_port

    experts = {name: str(path) for name, path in zip(NAMES, family.experts, strict=True)}
    asked = {
        "base": str(family.base), "experts": experts, "port": free_port(),
        "systems": [[system, str(tmp_path / f"two{n}")] for n, system in enumerate(systems)],
    }  # fmt: skip
    started = [
        subprocess.Popen([sys.executable, "-c", WORKER, json.dumps(asked | {"number": n})], stderr=subprocess.PIPE)
        for n in range(2)
    ]
    errors = [process.communicate(timeout=300)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    for n, system in enumerate(systems):
        compose.plan(str(family.base), experts, system).run(tmp_path / f"one{n}", devices="cpu")
        assert contents(tmp_path / f"two{n}") == contents(tmp_path / f"one{n}")


def test_no_array_of_the_dense_shape_is_in_the_program_of_adapters():
    from test_adapters_merged import dense, equations

    from cfmerge.engine import joint
    from cfmerge.engine.inputs import Inputs, settings_of

    m, n, ranks = 40, 24, (3, 4)
    base = jax.ShapeDtypeStruct((1, m, n), "float32")
    experts = [tuple(jax.ShapeDtypeStruct((1, *s), "float32") for s in ((m, r), (r, n))) for r in ranks]
    inputs = [Inputs(np.ones(1), number) for number in range(2)]
    for system in ("smile(rank=2, gate=3)", "tsv_c(ratio=0.1)"):
        method = choice(2, make(system))(_matrix(m, n), {}, make(system))
        settings = [settings_of([method])] * 2

        def step(base, experts, settings=settings):
            return joint.merge("oi", "float32", False, settings, base, experts, inputs, "float32")

        with jax.enable_x64(True):
            program = jax.make_jaxpr(step)(base, experts)
        assert [one.primitive.name for one in equations(program.jaxpr) if dense(one, m, n)] == [], system


def _matrix(m, n):
    return classify({"layers.0.up.weight": ((m, n), "float32")})["layers.0.up.weight"]
