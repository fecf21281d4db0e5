"""Composed results on eight devices: of files the bytes of one device, of sharded trees the numbers."""

import jax
import numpy as np
import pytest
from composed_parts import SYSTEMS, models
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cfmerge import compose

EACH = [SYSTEMS[0], SYSTEMS[3], *(pytest.param(system, marks=pytest.mark.long) for system in SYSTEMS[1:3])]


@pytest.mark.parametrize("system", EACH)
def test_files_give_the_parts_of_one_device(tmp_path, make_model, system):
    for name, own in zip(("base", "a", "b", "c"), models(), strict=True):
        make_model(tmp_path / name, own, None)
    experts = {name: tmp_path / name for name in "abc"}
    one, all_of_them = (
        compose.build(tmp_path / "base", experts, system, output=tmp_path / f"out-{devices}", devices=devices)
        for devices in ("cpu", "all")
    )
    for name, parts in one.parts.items():
        for part, values in parts.items():
            np.testing.assert_allclose(values, all_of_them.parts[name][part], atol=1e-5)
    if one.scales is not None:
        np.testing.assert_allclose(one.scales, all_of_them.scales, rtol=1e-6)


@pytest.mark.parametrize("system", EACH)
def test_sharded_trees_give_what_trees_on_one_device_give(system):
    trees = models()
    mesh = Mesh(np.array(jax.devices()), ("x",))

    def laid(leaf):
        spec = PartitionSpec("x") if leaf.shape[0] % 8 == 0 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    def sharded(tree):
        return {name: laid(leaf) for name, leaf in tree.items()}

    experts = dict(zip("abc", trees[1:], strict=True))
    one = compose.build(trees[0], experts, system)
    many = compose.build(sharded(trees[0]), {name: sharded(tree) for name, tree in experts.items()}, system)
    for task in experts:
        here, there = one.materialise(task, trees[0]), many.materialise(task, sharded(trees[0]))
        for name in here:
            np.testing.assert_allclose(here[name], there[name], atol=1e-5)
