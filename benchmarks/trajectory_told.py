"""The section and the picture of `trajectory_study.py`, from its rows."""

from pathlib import Path


def write(folder: Path, rows: list[dict]) -> None:
    pass
