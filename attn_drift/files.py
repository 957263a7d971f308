"""Files: atomic writing, and the cache of what is derived from a model."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it takes the place of ``path``, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """A block that only one process runs in a folder; the system releases the lock of a process that is killed.

    Raises:
        RuntimeError: another process is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(f"another process writes to {folder}; wait for it, or give another folder") from error
    try:
        yield
    finally:
        (folder / ".lock").unlink(missing_ok=True)
        lock.release()


@contextmanager
def keeping() -> Iterator[None]:
    """A block that writes to the cache: where that fails, what was computed is not lost, and the log says so."""
    try:
        yield
    except OSError as error:
        log.warning("the cache cannot be written (%s); ATTN_DRIFT_CACHE names another folder for it", error)


def cache_path(kind: str, suffix: str, key: Mapping[str, object]) -> Path:
    """Where something derived is cached: a name made from all that it depends on.

    The folder is ``$ATTN_DRIFT_CACHE``, or the user's cache folder.
    """
    folder = os.environ.get("ATTN_DRIFT_CACHE") or platformdirs.user_cache_dir("attn_drift")
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return Path(folder) / kind / f"{digest}{suffix}"
