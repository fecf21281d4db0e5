"""How one unit lies on devices: its arrays put there, its compiled steps, its results without what fills a mesh up.

one      on one device
stack    the stack is shared out over a mesh of one axis
rows     one matrix is shared out, by an axis of the stored tensor
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cfmerge import linalg
from cfmerge.engine.inputs import SHARED, STACK
from cfmerge.engine.steps import Steps, compiled
from cfmerge.engine.units import Unit

Kind = Literal["one", "stack", "rows"]
DISPATCH = threading.Lock()  # programs that wait for each other's devices start on all of them in one order


@dataclasses.dataclass(frozen=True)
class Spread:
    """How one unit lies on devices.

    Attributes:
        devices: all of a placement's; of a unit that one device does, the first is that one.
        axis: of the stored tensor, by which one matrix is shared out.
    """

    unit: Unit
    kind: Kind
    devices: tuple[jax.Device, ...]
    axis: int | None = None

    @property
    def ahead(self) -> bool:
        """Whether an expert is read while the device computes with the one before: not where both need the host."""
        return not on_host(self.devices)

    @property
    def filled(self) -> int:
        """The length of the stack with what fills the mesh up."""
        count = len(self.devices)
        return -(-self.unit.stack // count) * count if self.kind == "stack" else self.unit.stack

    def steps(self, layout: str, compute: str, quick: bool) -> Steps:
        """The compiled steps for arrays that lie so."""
        plain = compiled(layout, compute, quick, self.mesh)
        return Steps(*(self._in_order(step) for step in plain)) if self.kind == "rows" else plain

    def stored(self, array: Any) -> jax.Array:
        """The unit's share of a model, on its devices."""
        if self.kind == "stack":
            return self._shared(array)
        if self.kind == "rows":
            return jax.device_put(array, self._by_rows)
        return self._on_one(array)

    def put(self, tree: Any, specs: Any) -> Any:
        """The numbers that come with the arrays, on the devices; `specs` says which have an entry for each tensor."""
        if self.kind == "stack":
            return jax.tree.map(self._put, specs, tree, is_leaf=_is_spec)
        return tree

    def own(self, tree: Any) -> Any:
        """Arrays of the stack, on the host, without what fills the mesh up."""
        if self.kind != "stack":
            return tree
        stack = self.unit.stack
        return jax.tree.map(lambda leaf: np.asarray(leaf)[: leaf.shape[0] // self.filled * stack], tree)

    def whole(self, tree: Any) -> Any:
        """Statistics that come from elsewhere, `(stack, ...)` each, on the devices."""
        return self.put(tree, STACK) if self.kind == "stack" else tree

    @property
    def mesh(self) -> Mesh | None:
        """The devices that share the stack out; None: they do not."""
        return mesh_of(self.devices, SHARED) if self.kind == "stack" else None

    @property
    def counts(self) -> jax.Array:
        """Which tensors of the filled stack are the unit's."""
        return jax.device_put(np.arange(self.filled) < self.unit.stack, NamedSharding(self._mesh, STACK))

    # --- each way -----------------------------------------------------------------------------------------------------

    @property
    def _mesh(self) -> Mesh:
        return mesh_of(self.devices, SHARED)

    @property
    def _by_rows(self) -> NamedSharding:
        assert self.axis is not None
        spec = PartitionSpec(*[None] * (1 + self.axis), linalg.ROWS)
        return NamedSharding(mesh_of(self.devices, linalg.ROWS), spec)

    def _on_one(self, array: Any) -> jax.Array:
        devices = self.devices
        if not devices or devices[0] == jax.devices()[0]:
            return jnp.asarray(array)
        return jax.device_put(array, devices[0])

    def _put(self, spec: PartitionSpec, part: Any) -> Any:
        return jax.tree.map(self._shared, part) if spec == STACK else part

    def _shared(self, array: Any) -> jax.Array:
        """An array of the stack, each device with its share; the last tensor again fills the last shares up."""
        array = np.asarray(array)
        each, count = array.shape[0] // self.unit.stack, len(self.devices)
        share = each * self.filled // count
        parts = []
        for number, device in enumerate(self.devices):
            part = array[number * share : (number + 1) * share]
            if len(part) < share:
                last = array[len(array) - each :]
                part = np.concatenate([part, *[last] * ((share - len(part)) // each)])
            parts.append(jax.device_put(part, device))
        shape = (share * count, *array.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(self._mesh, STACK), parts)

    def _in_order(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def started(*arguments: Any) -> Any:
            with DISPATCH, jax.set_mesh(mesh_of(self.devices, linalg.ROWS)):
                return step(*arguments)

        return started


@functools.lru_cache
def mesh_of(devices: tuple[jax.Device, ...], axis: str) -> Mesh:
    """The devices as a mesh of one axis."""
    return Mesh(np.array(devices), (axis,), axis_types=(AxisType.Auto,))


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def on_host(devices: Sequence[jax.Device]) -> bool:
    """Whether the devices' memory is the host's."""
    return all(device.platform == "cpu" for device in devices)
