"""What a benchmark's folder holds: scores, rows, paired differences, failures, as tables."""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.folder import RunFolder
from analysis.methods import NONE
from analysis.scores import MEASURES, PROSE, Scores, results_row

# Pairs of tasks with the same texts, without and with the edit sentence before them.
DISTRACTED = {"DNS": "NS", "distracted_commonsense": "commonsense"}

NUMBERS = ["case", "task", *MEASURES, "value", "weight", "error"]


def part_path(folder: Path, method: str, chunk: int) -> Path:
    """The file of a chunk."""
    return folder / "parts" / re.sub(r"[^\w.+=-]", "_", method) / f"{chunk:06d}.parquet"


class Results(RunFolder):
    """A benchmark's folder."""

    KIND = "benchmark"

    @property
    def methods(self) -> list[str]:
        """Names of the methods that have run on all cases, the unedited model first."""
        return [name for name in self.config["methods"] if name not in self.incomplete]

    @cached_property
    def incomplete(self) -> list[str]:
        """Names of the methods that have not: what they have is in no summary."""
        return [name for name in self.config["methods"] if self._n_cases(name) < self.config["cases"]["n"]]

    def _n_cases(self, method: str) -> int:
        return sum(read_part(path, ["case"])["case"].nunique() for path in self._paths(method))

    def _paths(self, method: str) -> list[Path]:
        return sorted(part_path(self.folder, method, 0).parent.glob("*.parquet"))

    def scores(self, method: str, texts: bool = True) -> Scores:
        """All scores of a method.

        Args:
            method: its name.
            texts: with texts, objects and continuations; without them a tenth of the memory is needed.

        Raises:
            KeyError: there is no such method.
        """
        table = self._parts(method, None if texts else NUMBERS)
        return Scores(table[table["error"].isna()].drop(columns="error").reset_index(drop=True))

    @cached_property
    def failures(self) -> pd.DataFrame:
        """The cases that failed: ``method``, ``case``, ``error``."""
        tables = [self._parts(name, ["case", "error"]).dropna().assign(method=name) for name in self.methods]
        return pd.concat(tables, ignore_index=True)[["method", "case", "error"]]

    def _parts(self, method: str, columns: list[str] | None) -> pd.DataFrame:
        if method not in self.config["methods"]:
            raise KeyError(f"the benchmark has no method {method!r}; it has {list(self.config['methods'])}")
        paths = self._paths(method)
        if not paths:
            raise FileNotFoundError(f"no part of {method!r} has been written to {self.folder} yet")
        return pd.concat([read_part(path, columns) for path in paths], ignore_index=True)

    @cached_property
    def _numbers(self) -> dict[str, Scores]:
        return {name: self.scores(name, texts=False) for name in self.methods}

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """A row per method, laid out as in the demo's ``results.json``."""
        settings = self.config["methods"]
        return [
            results_row(name, settings[name]["gamma"], settings[name]["steps"], scores)
            for name, scores in self._numbers.items()
        ]

    @cached_property
    def long(self) -> pd.DataFrame:
        """`rows` as a table: ``editor``, ``metric``, ``mean``, ``low``, ``high``, ``half_width``, ``n``."""
        cells = [
            {"editor": row["editor"], "metric": metric, **cell}
            for row in self.rows
            for metric, cell in row.items()
            if isinstance(cell, dict)
        ]
        columns = ["editor", "metric", "mean", "low", "high", "half_width", "n"]
        return pd.DataFrame(cells, columns=columns)

    @cached_property
    def differences(self) -> pd.DataFrame:
        """Paired differences: ``first``, ``second``, ``metric``, ``difference``, ``low``, ``high``, ``p``, ``n``.

        Every method against the unedited model (damage by the edit) and against the first editor; and the unedited
        model after the edit sentence against itself without it (distraction by the context alone).
        """
        numbers, editors = self._numbers, self.methods[1:]
        pairs = [(name, NONE) for name in editors] + [(name, editors[0]) for name in editors[1:]]
        rows = [
            {"first": first, "second": second, **row}
            for first, second in pairs
            for row in _differences(numbers[first], numbers[second])
        ]
        columns = ["first", "second", "metric", "difference", "low", "high", "p", "n"]
        return pd.DataFrame([*self._distraction(numbers[NONE]), *rows], columns=columns)

    def _distraction(self, unedited: Scores) -> list[dict[str, Any]]:
        rows = []
        for task, plain in DISTRACTED.items():
            frame = unedited.frame
            after, before = Scores(frame[frame["task"] == task]), frame[frame["task"] == plain].assign(task=task)
            for row in _differences(after, Scores(before)):
                rows.append({"first": f"{NONE}, after the edit sentence", "second": f"{NONE}, without it", **row})
        return rows


def _differences(first: Scores, second: Scores) -> list[dict[str, Any]]:
    """The differences of all that was measured in both."""
    measures = [
        (task, measure)
        for task in first.tasks
        for measure in (("value",) if task in PROSE else MEASURES)
        if first.shares(second, task, measure)
    ]
    if not measures:
        return []
    return [
        {
            "metric": task if measure in ("value", "success") else f"{task}_{measure}",
            "difference": found.mean,
            "low": found.low,
            "high": found.high,
            "p": found.p,
            "n": found.n,
        }
        for (task, measure), found in first.differences(second, measures).items()
    ]


def read_part(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """A part.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return pd.read_parquet(path, columns=columns)
    except (OSError, ValueError) as error:
        raise ValueError(f"the part {path} is damaged ({error}); delete it and run the benchmark again") from error
