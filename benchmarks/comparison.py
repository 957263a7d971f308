"""What a run of the benchmarks finds: times of two paths in turn, and other figures; where they are written."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workloads import THREADS

from attn_drift.files import replacing

OUT = Path("build/bench")

# A way to do some work once, given the round; returns the seconds per unit.
Way = Callable[[int], float]


@dataclass(frozen=True)
class Comparison:
    """Seconds per unit of some work in every round, by the fast path and by plain ones."""

    work: str
    unit: str
    fast: list[float]
    plain: dict[str, list[float]]

    def rows(self) -> list[str]:
        """Of the table: one for each plain path."""
        return [self._row(label, plain) for label, plain in self.plain.items()]

    def _row(self, label: str, plain: list[float]) -> str:
        fast, slow = (1000 * statistics.median(times) for times in (self.fast, plain))
        ratios = [b / a for a, b in zip(self.fast, plain, strict=True)]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        return f"| {self.work} | {self.unit} | {fast:.2f} | {label} | {slow:.2f} | {spread} | {len(ratios)} |"


@dataclass
class Report:
    """What the run found."""

    comparisons: list[Comparison] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    HEAD = (
        "| work | per | fast, ms | plain path | plain, ms | ratio [min, max] | rounds |",
        "|---|---|---|---|---|---|---|",
    )

    def lines(self) -> list[str]:
        """The table of ratios."""
        clock = "Processor time" if THREADS == 1 else "Time on the wall"
        said = f"{clock}, threads: {THREADS}. In every round the plain path, then the fast one; ratios are of rounds."
        return [said, "", *self.HEAD, *(row for comparison in self.comparisons for row in comparison.rows())]

    def write(self) -> None:
        """The table as ``table.md``, the other figures as ``figures.json``."""
        files = {"table.md": "\n".join(self.lines()), "figures.json": json.dumps(self.figures, indent=1)}
        for name, text in files.items():
            with replacing(OUT / name) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
