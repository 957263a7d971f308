"""The folder of a long run: claimed for what is run, refused to any other run, resumed where it was interrupted."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from attn_drift.files import alone_in, replacing

CONFIG = "config.json"


@dataclass(frozen=True)
class RunFolder:
    """A folder that a run has been claimed for, read when it is first asked for.

    ``config.json`` says what is run: its ``kind``; ``identity``, the same for all that the folder holds; ``methods``,
    by name, to which later runs may add; and whatever else describes the run.

    Attributes:
        folder: where it is.

    Raises:
        FileNotFoundError: no run was claimed there.
    """

    KIND: ClassVar[str] = "run"

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if not (self.folder / CONFIG).is_file():
            raise FileNotFoundError(f"{self.folder.absolute()} is no {self.KIND}: it has no {CONFIG}")

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``.

        Raises:
            ValueError: it is damaged, or of another kind of run.
        """
        path = self.folder / CONFIG
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if config["kind"] == self.KIND and isinstance(config["identity"], dict):
                return config
        except (ValueError, TypeError, KeyError):
            pass
        raise ValueError(f"{path} is not of a {self.KIND}, or damaged; give another folder")

    @property
    def identity(self) -> dict[str, Any]:
        """What all results in the folder have in common."""
        identity: dict[str, Any] = self.config["identity"]
        return identity

    @classmethod
    def find(cls, folder: Path) -> "RunFolder | None":
        """The run of a folder; None where none was claimed."""
        return cls(folder) if (folder / CONFIG).is_file() else None

    def check_same(self, identity: Mapping[str, Any], methods: Mapping[str, Any] | None = None) -> None:
        """Raises a ValueError where the folder holds a run of another identity, or other settings of a method's name.

        Of both, what is not given is not compared.
        """
        given, added = _as_json(identity), _as_json(methods or {})
        before = self.config.get("methods", {})
        other = [key for key, value in given.items() if self.config["identity"].get(key) != value]
        other += [name for name, settings in added.items() if before.get(name, settings) != settings]
        if other:
            raise ValueError(
                f"{self.folder} holds another run, which differs in {', '.join(other)} (see {self.folder / CONFIG}); "
                "give another folder, or the same settings to resume it"
            )

    @classmethod
    def write(
        cls,
        folder: Path,
        identity: Mapping[str, Any],
        methods: Mapping[str, Any] | None = None,
        began: Mapping[str, Any] | None = None,
        **description: Any,
    ) -> None:
        """Writes ``config.json``; methods that the folder holds already stay in it.

        Args:
            folder: the folder.
            identity: what all results in the folder have in common.
            methods: what is run, by name.
            began: a description of the run that began the folder; it stays when the run is resumed.
            description: a description of the last run.

        Raises:
            ValueError: the folder holds another run.
        """
        held = cls.find(folder)
        before = {} if held is None else held.config
        if held is not None:
            held.check_same(identity, methods)
        config = {
            "kind": cls.KIND,
            "identity": identity,
            "methods": {**before.get("methods", {}), **(methods or {})},
            "began": before.get("began", began or {}),
            **description,
        }
        with replacing(folder / CONFIG) as temporary:
            temporary.write_text(json.dumps(config, indent=1), encoding="utf-8")

    @classmethod
    @contextmanager
    def claimed(
        cls, folder: Path, identity: Mapping[str, Any], methods: Mapping[str, Any] | None = None
    ) -> Iterator[None]:
        """A block in which this process alone writes to a folder, which holds this run or nothing.

        Raises:
            ValueError: the folder holds another run.
            RuntimeError: another process is writing to it.
        """
        with alone_in(folder):
            cls.write(folder, identity, methods)
            yield


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """A value as JSON has it, where tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain
