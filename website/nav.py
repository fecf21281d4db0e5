"""The nav as `mkdocs.yml` has it, with pages that come and go: reserved ones, and results of new experiments."""

from pathlib import Path
from typing import Any

RESERVED = ("results/fresh.md",)  # left out until they are there


def on_config(config: Any) -> Any:
    """The configuration without reserved pages that are missing, and with every page of `docs/results`."""
    docs = Path(config.docs_dir)
    config.nav = _without(config.nav, {page for page in RESERVED if not (docs / page).exists()})
    results = next(section["Results"] for section in config.nav if "Results" in section)
    results += [page for page in sorted(_pages(docs / "results", docs)) if page not in results]
    return config


def _pages(folder: Path, docs: Path) -> set[str]:
    return {path.relative_to(docs).as_posix() for path in folder.glob("*.md")}


def _without(nav: list[Any], missing: set[str]) -> list[Any]:
    return [
        {key: _without(value, missing) if isinstance(value, list) else value for key, value in one.items()}
        if isinstance(one, dict)
        else one
        for one in nav
        if isinstance(one, dict) or one not in missing
    ]
