"""A merge shared by the processes of `jax.distributed`: all make the same call, and meet beside the output."""

import contextlib
import dataclasses
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from cfmerge import recipe as recipes
from cfmerge.engine.placement import Devices, Placement, placement_of
from cfmerge.engine.processes import Processes, dealt
from cfmerge.errors import CfmergeError
from cfmerge.formats.meeting import COME, Meeting
from cfmerge.formats.ranges import Range


@contextlib.contextmanager
def together(output: Any, devices: Devices = None) -> Iterator[Placement]:
    """A context with the placement of a merge: on these devices, shared by the processes of `jax.distributed`.

    A placement that is given is taken as it is. A merge into a user's own sink is shared by nobody.

    Raises:
        CfmergeError: there are no such devices, or the other processes do not come.
    """
    if isinstance(devices, Placement):
        yield devices
        return
    placement = placement_of(devices)
    if jax.process_count() == 1 or not isinstance(output, str | Path):
        yield placement
        return
    with Meeting(Path(output), jax.process_index(), jax.process_count()) as meeting, meeting.telling():
        yield dataclasses.replace(placement, processes=meeting)


def joined_by(coordinator: str | None, processes: str | None, process: int | None, devices: Devices) -> None:
    """Makes this process one of those that share a merge, as the command line asks for it; else does nothing.

    When the processes know each other they leave JAX's service: it would end all others with one, at once and with a
    stack trace, and their devices compute apart.

    Raises:
        CfmergeError: the options do not fit each other, or the processes do not come.
    """
    if coordinator is None and processes is None and process is None:
        return
    how = _asked(coordinator, processes, process)
    waiting = threading.Timer(COME, _not_come, [processes])
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(**how, initialization_timeout=int(2 * COME), shutdown_timeout_seconds=60)
    except (RuntimeError, ValueError, TypeError) as error:
        told = str(error).strip().splitlines()[0]
        if processes == "auto":
            told += "; JAX finds processes of SLURM, Open MPI, Kubernetes and TPU pods: elsewhere name them"
        raise CfmergeError(f"--processes {processes}: the processes did not come together: {told}") from None
    finally:
        waiting.cancel()
    placement_of(devices)  # makes the devices, whose processes JAX counts
    jax.distributed.shutdown()


def _not_come(processes: str | None) -> None:
    """Ends this process, with a message: JAX itself would end it, without one."""
    print(
        f"error: --processes {processes}: not all processes have come in {COME:.0f} s; start each of them, with the "
        "same --coordinator, which all must reach",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)


def _asked(coordinator: str | None, processes: str | None, process: int | None) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize`."""
    if processes == "auto":
        if coordinator is not None or process is not None:
            raise CfmergeError("--processes auto: JAX finds the coordinator and the process's number; leave both out")
        return {}
    if coordinator is None or processes is None or process is None:
        raise CfmergeError("give all of --coordinator HOST:PORT, --processes N and --process I, or --processes auto")
    if not processes.isdecimal() or not 0 <= process < int(processes):
        raise CfmergeError(
            f"--processes {processes} --process {process}: expected a number of processes, or auto, and one of them "
            "counted from 0"
        )
    if not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdecimal():
        raise CfmergeError(f"--coordinator {coordinator!r}: expected HOST:PORT, of process 0")
    numbers = {"num_processes": int(processes), "process_id": process}
    return {"coordinator_address": coordinator, **numbers, "cluster_detection_method": "deactivate"}


def memory_of(processes: Processes, memory: str | int | None, free: int) -> int:
    """The bound of the working set, the same for all processes: what is asked for, else a quarter of the free memory.

    That quarter is shared by the processes of one machine.
    """
    own = None if memory is None else recipes.parse_size(str(memory))
    told = processes.gathered("memory", [socket.gethostname(), own, free // 4])
    here = Counter(host for host, _, _ in told)
    return min(asked if asked is not None else quarter // here[host] for host, asked, quarter in told)


def check_same_plan(processes: Processes, digest: str) -> None:
    """Raises `CfmergeError` if the processes are about to do different things."""
    digests = processes.gathered("plan", digest)
    others = [number for number, other in enumerate(digests) if other != digests[0]]
    if others:
        raise CfmergeError(
            f"process {others[0]} of {processes.count} plans another merge than the first: all need the same command, "
            "the same version of cfmerge, and the same files (paths, sizes and times) on a shared file system; "
            "methods and statistics must come from files"
        )


def my_files(processes: Processes, files: Sequence[Path]) -> list[Path]:
    """The files that this process hashes."""
    owners = dealt([file.stat().st_size for file in files], processes.count)
    return [file for file, owner in zip(files, owners, strict=True) if owner == processes.number]


def all_digests(processes: Processes, own: Mapping[Path, str], files: Sequence[Path]) -> dict[Path, str]:
    """The hashes of all files, out of this process's."""
    told = processes.gathered("hashes", [[str(file), digest] for file, digest in own.items()])
    found = {Path(file): digest for each in told for file, digest in each}
    return {file: found[file] for file in files}


def ranges_of_others(processes: Processes, own: Iterator[Range]) -> list[Range]:
    """The ranges of the output that the others have written."""
    told = processes.gathered("written", [list(one) for one in own])
    return [tuple(one) for number, each in enumerate(told) if number != processes.number for one in each]
