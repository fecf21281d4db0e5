"""These tests need eight devices: tests/test_eight_devices.py runs them."""

import os

collect_ignore_glob = [] if os.environ.get("JAX_NUM_CPU_DEVICES") == "8" else ["*"]
