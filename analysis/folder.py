"""A folder that a long run writes its results to."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

CONFIG = "config.json"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, read when it is first asked for.

    Raises:
        FileNotFoundError: it is none.
    """

    KIND: ClassVar[str] = "run"

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if not (self.folder / CONFIG).is_file():
            raise FileNotFoundError(f"{self.folder.absolute()} is no {self.KIND}: it has no {CONFIG}")

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``: what is run."""
        config: dict[str, Any] = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
        return config
