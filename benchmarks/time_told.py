"""The tables, plots and words of `time_study.py`."""

import numpy as np
from collections.abc import Mapping
from typing import Any
from time_stream import ADAPTATION, HELD_OUT

def ka(row):
    return 100 * float(np.mean([row["scores"][name] for name in row["scores"] if name not in HELD_OUT]))
def zs(row):
    return 100 * float(np.mean([row["scores"][name] for name in row["scores"] if name in HELD_OUT]))
def gm(row: Mapping[str, Any]) -> float:
    return float(np.sqrt(ka(row) * zs(row)))
def write(folder, rows, chosen): print(chosen, len(rows))
