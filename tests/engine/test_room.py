"""Units in work share the memory."""

import threading

import numpy as np
import pytest
from laid import laid

import cfmerge
from cfmerge import methods
from cfmerge.engine.loop import Loop
from cfmerge.engine.room import Room
from cfmerge.engine.units import Unit


def _enters(room: Room, size: int) -> tuple[threading.Event, threading.Event]:
    """Events of a thread that wants to hold so many bytes: set when it does; to be set to let it go."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with room.holding(size):
            inside.set()
            leave.wait(10)

    threading.Thread(target=hold, daemon=True).start()
    return inside, leave


def test_units_that_fit_together_are_worked_on_together():
    room = Room(100)
    each = [_enters(room, size) for size in (60, 40, 0)]
    assert all(inside.wait(10) for inside, _ in each)
    for _, leave in each:
        leave.set()


@pytest.mark.parametrize("size", [50, 1000])
def test_a_unit_waits_until_it_fits(size):
    room = Room(100)
    first, leave_first = _enters(room, 60)
    assert first.wait(10)
    second, leave_second = _enters(room, size)
    assert not second.wait(0.2)
    leave_first.set()
    assert second.wait(10)
    leave_second.set()


def test_a_unit_that_fails_leaves_its_room():
    room = Room(100)
    with pytest.raises(ValueError, match="its own"), room.holding(80):
        raise ValueError("its own")
    inside, leave = _enters(room, 80)
    assert inside.wait(10)
    leave.set()


def test_no_more_is_in_work_than_the_memory_holds(tmp_path, monkeypatch):
    """Two of the larger matrices do not fit together; one of them and a smaller one do."""
    random, shapes = np.random.default_rng(0), {"a": (600, 512), "b": (600, 512), "c": (512, 512), "d": (600, 512)}
    tensors = {
        f"layers.0.{name}.weight": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
    }
    for number, who in enumerate(("base", "one", "two")):
        laid(tmp_path / who, {"model.safetensors": {name: array + 0.01 * number for name, array in tensors.items()}})
    needs, using, most, lock, solved = {}, [], [], threading.Lock(), Loop.merged

    def watched(loop: Loop, unit: Unit, found: object) -> object:
        with lock:
            using.append(unit.working_bytes)
            most.append(sum(using))
            needs[unit.job.name] = unit.working_bytes
        try:
            return solved(loop, unit, found)
        finally:
            with lock:
                using.remove(unit.working_bytes)

    monkeypatch.setattr(Loop, "merged", watched)
    models = tmp_path / "base", [tmp_path / "one", tmp_path / "two"]
    cfmerge.merge(*models, methods.ace(), output=tmp_path / "free", memory="1GB")
    memory = needs["layers.0.a.weight"] + needs["layers.0.c.weight"]
    most.clear()
    cfmerge.merge(*models, methods.ace(), output=tmp_path / "bound", memory=memory)
    assert needs["layers.0.a.weight"] <= max(most) <= memory
    assert (tmp_path / "free/model.safetensors").read_bytes() == (tmp_path / "bound/model.safetensors").read_bytes()
