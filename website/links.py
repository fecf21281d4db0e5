"""Links from `docs/` to the rest of the repository, which the site does not hold, as links to its pages on GitHub."""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks.links")
LINK = re.compile(r"\]\((?![a-z]+:|#|/)([^)\s#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page with such links absolute; strict builds fail where a file is missing."""
    root = Path(config.config_file_path).parent
    folder = posixpath.dirname(posixpath.join("docs", page.file.src_uri))

    def absolute(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if target == "docs" or target.startswith("docs/"):
            return match[0]
        if not (root / target).exists():
            log.warning("%s: a link to %s, which is not there", page.file.src_uri, target)
        kind = "tree" if (root / target).is_dir() else "blob"
        return f"]({config.extra['repository']}/{kind}/main/{target}{match[2] or ''})"

    return LINK.sub(absolute, markdown)
