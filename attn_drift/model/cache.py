"""The cache of what is derived from a model: when it is used, and how a file shows that it is what was asked for."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from transformer_lens.model_bridge import TransformerBridge

from attn_drift.files import cache_path, keeping, replacing
from attn_drift.model.loading import disturbance

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# What was said last of each model, so that it is said once.
_said: WeakKeyDictionary[TransformerBridge, str] = WeakKeyDictionary()


def is_usable(model: TransformerBridge) -> bool:
    """Whether the model computes what its weights say, so that what it gives may be cached; the log says why not."""
    why = disturbance(model)
    if why is not None and _said.get(model) != why:
        log.warning("nothing of %s is cached meanwhile: %s", model.cfg.model_name, why)
        _said[model] = why
    return why is None


def fetch(path: Path, read: Callable[[Path], _T]) -> _T | None:
    """What is cached at a path; None where there is nothing, or where ``read`` raises, which is logged."""
    if not path.is_file():
        return None
    try:
        return read(path)
    except (OSError, ValueError) as error:
        log.warning("a file of the cache is not used, and made anew: %s", error)
        return None


def cached(model: TransformerBridge, kind: str, key: Mapping[str, object], make: Callable[[], Any]) -> Any:
    """What is cached under a key, made and written where it is not; only made while something disturbs the model.

    Args:
        model: what it is derived from.
        kind: of what is derived, the name of a folder in the cache.
        key: all that it depends on.
        make: returns something that JSON can hold.
    """
    if not is_usable(model):
        return make()
    path = cache_path(kind, ".jsonl", key)
    content = fetch(path, lambda path: _read(path, key))
    if content is None:
        content = json.dumps(make()).encode()
        if is_usable(model):
            with keeping(), replacing(path) as temporary:
                temporary.write_bytes(_header(key, content) + b"\n" + content)
    return json.loads(content)


def _header(key: Mapping[str, object], content: bytes) -> bytes:
    """The first line of a file: the key and a digest of the second line, the content."""
    return json.dumps({"key": key, "sha256": hashlib.sha256(content).hexdigest()}, sort_keys=True).encode()


def _read(path: Path, key: Mapping[str, object]) -> bytes:
    """The content of a file; raises a ValueError where it is not what was written under the key."""
    header, _, content = path.read_bytes().partition(b"\n")
    if header != _header(key, content):
        raise ValueError(f"{path} is damaged, was changed, or was written under another key")
    return content
