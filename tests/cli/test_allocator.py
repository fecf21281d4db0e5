"""Memory that a unit of work has freed is there for the next one."""

import os
import subprocess
import sys
import sysconfig

import pytest

FAULTS = """
import resource, sys
import numpy as np
from cfmerge.cli.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for round in range(50):
    if round == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(1 << 20) for _ in range(4)]
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, env=variables
    )
    return int(done.stdout)


@pytest.mark.skipif("linux-gnu" not in (sysconfig.get_config_var("MULTIARCH") or ""), reason="of glibc")
def test_pages_are_not_asked_for_again():
    """A page that is new is a fault. 45 rounds of 32 MiB are 368,640 pages of 4 KiB, or fewer huge ones."""
    assert faults("kept") < 50 < faults("given back")
