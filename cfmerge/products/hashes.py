"""SHA-256 of input files, kept in the user's cache for files that have not changed since.

A file is known by machine, device, inode, size and the times of its last change (of its bytes, and of its inode, which
nobody can set). A file that changed a moment ago is not kept: it may change again within the clock's resolution.
"""

import contextlib
import hashlib
import os
import platform
import threading
import time
from pathlib import Path

from cfmerge.engine.user_cache import Unusable, own_directory, shrink, write_whole

SETTLED = 2.0  # seconds since the last change
LIMIT = 1 << 20  # bytes of all digests that are kept


def sha256(file: Path, stop: threading.Event, fresh: bool = False) -> str:
    """The digest of a file, in hexadecimal; empty if `stop` was set meanwhile.

    Args:
        fresh: read the file though its digest is known.
    """
    kept = _place(file)
    if kept is None:
        return _computed(file, stop)
    digest = None if fresh else _read(kept)
    if digest is None:
        digest = _computed(file, stop)
        if digest and _place(file) == kept:
            _keep(kept, digest)
    return digest


def is_known(file: Path) -> bool:
    """Whether a file need not be read for its digest."""
    kept = _place(file)
    return kept is not None and _read(kept) is not None


def _computed(file: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            if stop.is_set():
                return ""
            digest.update(block)
    return digest.hexdigest()


def _place(file: Path) -> Path | None:
    """Where the digest of a file is kept, which is another place when the file changes; None: nowhere."""
    found = file.stat()
    if not hasattr(os, "getuid") or found.st_ino == 0:  # Windows tells when a file was made, not when it changed
        return None
    if time.time() - max(found.st_mtime, found.st_ctime) < SETTLED:
        return None
    known = f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    machine, name = (hashlib.sha256(text.encode()).hexdigest() for text in (platform.node(), known))
    try:
        return own_directory("sha256", machine[:8]) / name
    except Unusable:
        return None


def _read(kept: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        digest = kept.read_text()
        if len(bytes.fromhex(digest)) == hashlib.sha256().digest_size:
            return digest
    return None


def _keep(kept: Path, digest: str) -> None:
    with contextlib.suppress(OSError):
        write_whole(kept, digest)
        shrink(kept.parent, LIMIT)
