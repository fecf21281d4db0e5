"""Places in the nav that are kept for pages that are yet to come."""

from pathlib import Path
from typing import Any

RESERVED = ("diagnose.md", "report.md", "published.md", "results/fresh.md")


def on_config(config: Any) -> Any:
    """The configuration without those that are not there."""
    docs = Path(config.docs_dir)
    missing = {page for page in RESERVED if not (docs / page).exists()}
    config.nav = _without(config.nav, missing)
    return config


def _without(nav: list[Any], missing: set[str]) -> list[Any]:
    kept = [one for one in nav if isinstance(one, dict) or one not in missing]
    return [
        {key: _without(value, missing) if isinstance(value, list) else value for key, value in one.items()}
        if isinstance(one, dict)
        else one
        for one in kept
    ]
