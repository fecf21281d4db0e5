"""The tests in `eight_devices/`, each file in a process of its own that has eight virtual devices.

All other tests run on one device, as most users' processes do: with eight XLA starts a thread for each, and the
tests take a third more time. To run a file of that folder by hand:

    JAX_NUM_CPU_DEVICES=8 pytest -n 0 tests/eight_devices/test_sharded_trees.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
FILES = sorted(file.name for file in (HERE / "eight_devices").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES)
def test_on_eight_devices(file: str, pytestconfig: pytest.Config):
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    chosen = ["-m", pytestconfig.option.markexpr] if pytestconfig.option.markexpr else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", *chosen, f"tests/eight_devices/{file}"],
        capture_output=True, text=True, cwd=HERE.parent, env={**own, "JAX_NUM_CPU_DEVICES": "8"},
    )  # fmt: skip
    none_chosen = done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED and bool(chosen)
    assert done.returncode == 0 or none_chosen, done.stdout + done.stderr
