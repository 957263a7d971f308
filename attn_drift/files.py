"""Files: atomic writing, a folder for one process alone, and the cache of what is derived from a model.

What is written goes to a work folder beside its place first, and is then renamed. The process that writes holds a lock
in its work folder, which the system releases when the process ends, however it ends. A work folder whose lock is free
was left behind by a process that was killed: it is removed before the next one writes there.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

import platformdirs
from filelock import FileLock, Timeout
from safetensors import SafetensorError

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

# Names of work folders, and of the lock in a folder.
PREFIX, SUFFIX, LOCK = ".attn_drift-", ".tmp", ".lock"

# Caches that could not be written: said once each.
_unwritable: set[Path] = set()

# How deep the folder of a run goes: parts/rome, sequences/memit.
DEPTH = 2


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write a file or a folder; on success it takes the place of ``path``, on failure it is removed.

    Raises:
        OSError: it cannot be written; ``path`` and the reason are named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_once(path.parent.absolute())
    with name_write_errors(path), _work_folder(path.parent) as folder:
        temporary = folder / path.name
        yield temporary
        temporary.replace(path)


@contextmanager
def name_write_errors(path: Path) -> Iterator[None]:
    """A block that writes a file: what goes wrong becomes an OSError that names it, whichever library was writing."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        reason = str(error) if number is None else os.strerror(number)
        said = f"{reason}; mend this or write elsewhere"
        raise OSError(number or errno.EIO, said, str(path)) from error


def _error_number(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error, which safetensors tells in its message alone."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


@contextmanager
def _work_folder(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent``, locked while its process lives, and removed at the end."""
    folder, lock = _locked_folder(parent)
    try:
        with lock:
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _locked_folder(parent: Path) -> tuple[Path, IO[str]]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, suffix=SUFFIX, dir=parent))
        try:
            lock = (folder / LOCK).open("a")
        except FileNotFoundError:
            continue
        except OSError:
            folder.rmdir()
            raise
        # Where a file system has no locks, what a killed process leaves behind stays there.
        with suppress(OSError):
            _lock(lock, wait=True)
        # Before it was locked, another process may have taken it for one that was left behind.
        if (folder / LOCK).exists():
            return folder, lock
        lock.close()


def _lock(file: IO[str], wait: bool) -> None:
    """Locks a file until it is closed; raises an OSError where another process has it, or where there are no locks."""
    if sys.platform == "win32":
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_stale(folder: Path, depth: int = 0) -> None:
    """Removes the work folders that killed processes left in a folder, and in its subfolders down to a depth."""
    for level in range(depth + 1):
        for stale in folder.glob("*/" * level + f"{PREFIX}*{SUFFIX}"):
            # Errors: its process lives, another one removed it, or it is no work folder.
            with suppress(OSError):
                with (stale / LOCK).open("a") as lock:
                    _lock(lock, wait=False)
                    shutil.rmtree(stale, ignore_errors=True)
                # On a network, a folder is there for as long as a file in it is open.
                stale.rmdir()


# Once per process, since a folder with thousands of parts takes a while to look through.
_remove_stale_once = cache(_remove_stale)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """A block that only one process runs in a folder; the system releases the lock of a process that is killed.

    What such a process was writing in the folder is removed.

    Raises:
        RuntimeError: another process is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(f"another process writes to {folder}; wait for it, or give another folder") from error
    try:
        _remove_stale(folder, DEPTH)
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


@contextmanager
def keeping() -> Iterator[None]:
    """A block that writes to the cache: where that fails, what was computed is not lost, and the log says so once."""
    try:
        yield
    except OSError as error:
        folder = cache_folder()
        if folder not in _unwritable:
            _unwritable.add(folder)
            log.warning("the cache %s cannot be written (%s); ATTN_DRIFT_CACHE names another folder", folder, error)


def cache_folder() -> Path:
    """Where the cache is: ``$ATTN_DRIFT_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("ATTN_DRIFT_CACHE") or platformdirs.user_cache_dir("attn_drift"))


def cache_path(kind: str, suffix: str, key: Mapping[str, object]) -> Path:
    """Where something derived is cached: a name made from all that it depends on."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / kind / f"{digest}{suffix}"
