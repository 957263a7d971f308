"""Ways to edit compared at equal efficacy: at what each of them spares where it edits as well as the others.

Efficacy is the probability of the new object, averaged over the edit's prompt and over wordings that no edit used (that
the new object merely beats the old one, ES, is true of nearly every edit). Each line of a trade-off is read off where
it crosses the efficacy of a reference, linearly between its points.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray

from analysis.scores import Scores
from analysis.statistics import resampled_means

Means = Float[NDArray[Any], "draw metric"]
# Of which means efficacy is made, and what is read off at equal efficacy.
MADE_OF = (("ES", "p_right"), ("PS", "p_right"))
READ_OFF = (("DNS", "success"), ("RS", "success"), ("DNS", "p_right"), ("RS", "p_right"))


def _sums(scores: Scores) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sums and counts by case of what comparisons need."""
    measures = [(task, column) for task, column in (*MADE_OF, *READ_OFF) if task in scores.tasks]
    tables = [scores.per_case(task, column) for task, column in measures]
    totals, counts = (pd.concat([t[name] for t in tables], axis=1).fillna(0.0).sort_index() for name in _SUMS)
    return totals.to_numpy(), counts.to_numpy()


_SUMS = ("total", "count")


def efficacy(scores: Scores) -> float:
    """Probability of the new object, averaged over the edit's prompt and the wordings that no edit used."""
    totals, counts = _sums(scores)
    return float(_efficacy((totals.sum(0) / counts.sum(0))[None])[0])


def _efficacy(means: Means) -> Float[NDArray[Any], " draw"]:
    return np.asarray(means[:, : len(MADE_OF)].mean(1))


def at_equal_efficacy(
    by_line: Mapping[tuple[str, str], Sequence[tuple[float, Scores]]], reference: Scores, seed: int = 0
) -> pd.DataFrame:
    """What each line spares where its efficacy is that of a reference.

    Points are joined from the first on, the editor as it is, by straight lines; what is read off lies where the
    efficacy first crosses the reference's. Intervals draw the same cases for every line and for the reference.

    Args:
        by_line: by study and line the values of its knob, from the editor as it is on, with scores of the same cases.
        reference: the scores whose efficacy the others are compared at.
        seed: of the draws.

    Returns:
        A row per line: ``study``, ``line``, ``value`` of the knob (NaN, like all that follows, where the line does not
        come down to the reference's efficacy, or starts below it), ``reached`` (share of the draws in which it does),
        and of each task DNS and RS that was scored the success there with ``_low`` and ``_high``, and its difference
        from the reference's, ``_difference`` with ``_difference_low`` and ``_difference_high``.
    """
    names = [f"{task}" if column == "success" else f"{task}_p" for task, column in READ_OFF if task in reference.tasks]
    wanted = _drawn(reference, seed)
    read_off = []
    for (study, line), places in by_line.items():
        knob = np.array([value for value, _ in places])
        curve = np.stack([_drawn(scores, seed) for _, scores in places], axis=1)
        read = _read_off(knob, curve, _efficacy(wanted))
        reached = np.isfinite(read[1:, 0])
        row: dict[str, Any] = {"study": study, "line": line, "value": read[0, 0], "reached": float(reached.mean())}
        for i, name in enumerate(names):
            column, difference = read[:, 1 + i], read[:, 1 + i] - wanted[:, len(MADE_OF) + i]
            row |= {name: column[0], f"{name}_low": np.nan, f"{name}_high": np.nan}
            row |= {f"{name}_difference": difference[0]}
            row |= {f"{name}_difference_low": np.nan, f"{name}_difference_high": np.nan}
            if np.isfinite(read[0, 0]) and reached.any():
                row[f"{name}_low"], row[f"{name}_high"] = _percentiles(column[1:])
                row[f"{name}_difference_low"], row[f"{name}_difference_high"] = _percentiles(difference[1:])
        read_off.append(row)
    return pd.DataFrame(read_off)


def _percentiles(values: NDArray[Any]) -> tuple[float, float]:
    low, high = np.nanquantile(values, (0.025, 0.975))
    return float(low), float(high)


def _drawn(scores: Scores, seed: int) -> Means:
    """Means over all cases, and over draws of cases."""
    totals, counts = _sums(scores)
    return np.concatenate([(totals.sum(0) / counts.sum(0))[None], resampled_means(totals, counts, seed)])


def _read_off(
    knob: Float[NDArray[Any], " point"],
    curve: Float[NDArray[Any], "draw point metric"],
    efficacy: Float[NDArray[Any], " draw"],
) -> Float[NDArray[Any], "draw column"]:
    """Per draw the knob's value and the metrics where the curve first comes down to an efficacy; NaN if it does not."""
    own = np.stack([_efficacy(curve[:, point]) for point in range(len(knob))], axis=1)
    knobs = np.broadcast_to(knob[None, :, None], (*own.shape, 1))
    values = np.concatenate([knobs, curve[:, :, len(MADE_OF) :]], axis=2)
    result = np.full((len(own), values.shape[2]), np.nan)
    for point in range(len(knob) - 1):
        above, below = own[:, point], own[:, point + 1]
        crosses = np.isnan(result[:, 0]) & (above >= efficacy) & (below <= efficacy)
        drop = np.where(above > below, above - below, 1.0)
        part = np.where(above > below, (above - efficacy) / drop, 0.0)[crosses, None]
        result[crosses] = (1 - part) * values[crosses, point] + part * values[crosses, point + 1]
    return result
