"""Adapters merged in their joint basis on eight devices, as on one."""

import numpy as np
from adapter_parts import ADAPTERS, SHAPES, merged, works

from cfmerge.engine.placement import placement_of


def test_devices_share_out_the_adapters_of_alike_tensors():
    _, factored = works("ace", ADAPTERS, "float32")
    (one,), _ = merged(factored, placement=placement_of(1))
    (eight,), _ = merged(factored, placement=placement_of(8))
    for name in SHAPES:
        np.testing.assert_allclose(eight[name], one[name], rtol=0, atol=1e-6, err_msg=name)
