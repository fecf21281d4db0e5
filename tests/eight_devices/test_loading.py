"""Tensors of files lie on several devices as they are asked to, and a device's rows alone are read for it."""

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from cfmerge.compose import tangent_files
from cfmerge.compose.tangents import Tangents
from cfmerge.errors import CfmergeError
from cfmerge.formats import open_checkpoint
from cfmerge.formats.orbax import OrbaxCheckpoint
from cfmerge.formats.shards import save
from cfmerge.products.loading import load

KERNEL = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)
TREE = {"up": {"kernel": KERNEL, "bias": np.linspace(-1, 1, 8).astype(ml_dtypes.bfloat16)}, "count": np.array(3)}
SPECS = [P(), P("data"), P(None, "model"), P("data", "model"), P(("data", "model"))]


@pytest.fixture
def mesh() -> Mesh:
    return jax.make_mesh((4, 2), ("data", "model"))


def orbax(path: Path) -> OrbaxCheckpoint:
    ocp.save(path / "model", TREE)
    return OrbaxCheckpoint(path / "model", whole=True)


class Counted:
    """A container that notes what is read of it."""

    def __init__(self, inner):
        self.inner, self.tensors, self.ties, self.path = inner, inner.tensors, inner.ties, inner.path
        self.entries: list[int] = []

    def read(self, name, first=0, count=None):
        values = self.inner.read(name, first, count)
        self.entries.append(values.size)
        return values


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_an_orbax_checkpoint_is_laid_as_its_target_says(tmp_path, mesh, spec):
    sharding = NamedSharding(mesh, spec)
    like = {
        "up": {
            "kernel": jax.ShapeDtypeStruct((16, 8), np.float32, sharding=sharding),
            "bias": jax.ShapeDtypeStruct((8,), ml_dtypes.bfloat16),
        }
    }
    found = load(orbax(tmp_path), like)
    kernel = found["up"]["kernel"]
    assert kernel.sharding == sharding
    assert np.array_equal(kernel, KERNEL)
    for shard in kernel.addressable_shards:
        assert np.array_equal(shard.data, KERNEL[shard.index])
    assert found["up"]["bias"].dtype == jnp.bfloat16
    assert np.array_equal(found["up"]["bias"], TREE["up"]["bias"])


def test_the_same_shards_come_from_orbax_itself(tmp_path, mesh):
    source = orbax(tmp_path)
    sharding = NamedSharding(mesh, P("data", "model"))
    like = {
        "up": {"kernel": jax.ShapeDtypeStruct((16, 8), np.float32, sharding=sharding), "bias": TREE["up"]["bias"]},
        "count": TREE["count"],
    }
    expected = ocp.load(tmp_path / "model", like)["up"]["kernel"]
    found = load(source, {"up": {"kernel": like["up"]["kernel"]}})["up"]["kernel"]
    assert found.sharding == expected.sharding
    for ours, theirs in zip(found.addressable_shards, expected.addressable_shards, strict=True):
        assert ours.index == theirs.index
        assert np.array_equal(ours.data, theirs.data)


def test_each_row_is_read_once_for_all_devices(tmp_path, mesh):
    save(tmp_path, {"w": KERNEL}, {}, "model")
    for spec in SPECS:
        source = Counted(open_checkpoint(tmp_path))
        like = {"w": jax.ShapeDtypeStruct((16, 8), np.float32, sharding=NamedSharding(mesh, spec))}
        assert np.array_equal(load(source, like)["w"], KERNEL)
        assert sum(source.entries) == KERNEL.size
        assert max(source.entries) <= KERNEL.size // (mesh.shape["data"] if "data" in str(spec) else 1)


def test_one_sharding_is_for_all_arrays_that_are_given_none(tmp_path, mesh):
    sharding = NamedSharding(mesh, P("model"))
    save(tmp_path, {"w": KERNEL, "b": np.ones(4, np.float32)}, {}, "model")
    found = load(tmp_path, sharding=sharding)
    assert found["w"].sharding == found["b"].sharding == sharding
    assert set(load(tmp_path)["w"].devices()) == {jax.devices()[0]}


def test_arrays_may_stand_for_shardings_and_dtypes(tmp_path, mesh):
    save(tmp_path, {"w": KERNEL}, {}, "model")
    like = {"w": jax.device_put(jnp.zeros((16, 8), jnp.bfloat16), NamedSharding(mesh, P("data")))}
    found = load(tmp_path, like)["w"]
    assert (found.sharding, found.dtype) == (like["w"].sharding, jnp.bfloat16)
    assert np.array_equal(found, KERNEL.astype(ml_dtypes.bfloat16))


def test_what_is_missing_or_of_another_shape_is_named(tmp_path):
    save(tmp_path, {"up": KERNEL}, {}, "model")
    with pytest.raises(CfmergeError, match=r"lacks 1 of 2 tensors, such as 'upp'; did you mean 'up'"):
        load(tmp_path, {"up": KERNEL, "upp": KERNEL})
    with pytest.raises(CfmergeError, match=r"'up' should have shape \(8, 16\), and has \(16, 8\)"):
        load(tmp_path, {"up": KERNEL.T})


def test_numbers_that_jax_narrows_are_told(tmp_path):
    save(tmp_path, {"w": KERNEL.astype(np.float64)}, {}, "model")
    with pytest.warns(UserWarning, match="'w', are float64, and JAX holds them as float32"):
        found = load(tmp_path)["w"]
    assert found.dtype == np.float32
    with warnings.catch_warnings(), jax.enable_x64(True):
        warnings.simplefilter("error")
        assert load(tmp_path)["w"].dtype == np.float64


def test_tangent_components_lie_as_their_base_does_and_answer_there(tmp_path, mesh):
    columns, entries = NamedSharding(mesh, P(None, "model")), NamedSharding(mesh, P("model"))
    base = {"up": {"kernel": jax.device_put(KERNEL, columns), "bias": jax.device_put(jnp.ones(8), entries)}}
    made = Tangents(base).add("a", {"up/kernel": 0.1 * KERNEL}).add("b", {"up/bias": jnp.full(8, 0.5)}, -2.0)
    loaded = tangent_files.load(tangent_files.save(made, tmp_path / "components"), base)
    assert (loaded.components[0]["up/kernel"].sharding, loaded.components[1]["up/bias"].sharding) == (columns, entries)

    def network(params, x):
        return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])

    x = jnp.linspace(-0.01, 0.01, 32).reshape(2, 16)
    found = jax.jit(lambda tangents, x: tangents.apply(network, x))(loaded, x)
    near = Tangents(jax.device_get(base)).add("a", {"up/kernel": 0.1 * KERNEL}).add("b", {"up/bias": jnp.full(8, -1.0)})
    np.testing.assert_allclose(found, near.apply(network, x), rtol=1e-5)
