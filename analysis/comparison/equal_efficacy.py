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

from analysis.scoring.scores import Scores
from analysis.statistics import percentiles, resampled_means

REACHED, ABOVE, BELOW = "reached", "stays above", "starts below"
# Share of the draws of cases that must come down to the reference for an interval.
ENOUGH = 0.95

Means = Float[NDArray[Any], "draw metric"]
# Of which means efficacy is made, and what is read off at equal efficacy.
MADE_OF = (("ES", "p_right"), ("PS", "p_right"))
READ_OFF = (("DNS", "success"), ("RS", "success"), ("DNS", "p_right"), ("RS", "p_right"))


def _sums(scores: Scores) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sums and counts by case of what comparisons need.

    Raises:
        ValueError: efficacy cannot be told, for want of ES or PS texts.
    """
    lacking = [task for task, _ in MADE_OF if task not in scores.tasks]
    if lacking:
        raise ValueError(f"the scores have no texts of {lacking}, which efficacy is made of; they have {scores.tasks}")
    measures = [(task, column) for task, column in (*MADE_OF, *READ_OFF) if task in scores.tasks]
    tables = [scores.per_case(task, column) for task, column in measures]
    sums = ("total", "count")
    totals, counts = (pd.concat([t[name] for t in tables], axis=1).fillna(0.0).sort_index() for name in sums)
    return totals.to_numpy(), counts.to_numpy()


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
    efficacy first comes down to the reference's. A line through the reference is read off there. Intervals draw the
    same cases for every line and for the reference; where fewer than 95 % of the draws come down, there are none.

    Args:
        by_line: by study and line the values of its knob, from the editor as it is on, with scores of the same cases.
        reference: the scores whose efficacy the others are compared at.
        seed: of the draws.

    Returns:
        A row per line: ``study``, ``line``, ``state`` (`REACHED`, or `ABOVE` or `BELOW` the reference throughout, or
        from the start), ``value`` of the knob there (NaN, like all that follows, where it is not reached), ``reached``
        (share of the draws in which it is), and of each task DNS and RS that was scored the success there with ``_low``
        and ``_high``, and its difference from the reference's, ``_difference`` with ``_difference_low`` and
        ``_difference_high``; of p(right) likewise, as ``DNS_p`` and ``RS_p``.
    """
    names = [task if column == "success" else f"{task}_p" for task, column in READ_OFF if task in reference.tasks]
    wanted = _drawn(reference, seed)
    rows = []
    for (study, line), places in by_line.items():
        knob = np.array([value for value, _ in places])
        curve = np.stack([_drawn(scores, seed) for _, scores in places], axis=1)
        own = [i for i, (_, scores) in enumerate(places) if scores is reference]
        read = _at(knob, curve, own[0]) if own else _read_off(knob, curve, _efficacy(wanted))
        state = REACHED
        if np.isnan(read[0, 0]):
            state = BELOW if _efficacy(curve[:1, 0])[0] < _efficacy(wanted)[0] else ABOVE
        reached = float(np.isfinite(read[1:, 0]).mean())
        row: dict[str, Any] = {"study": study, "line": line, "state": state, "value": read[0, 0], "reached": reached}
        for i, name in enumerate(names):
            column = read[:, 1 + i]
            row |= _cells(name, column, reached) | _cells(
                f"{name}_difference", column - wanted[:, len(MADE_OF) + i], reached
            )
        rows.append(row)
    return pd.DataFrame(rows)


def _cells(name: str, column: Float[NDArray[Any], " draw"], reached: float) -> dict[str, float]:
    """The value, and its interval where enough draws have one."""
    known = np.isfinite(column[0]) and reached >= ENOUGH
    low, high = percentiles(column[1:]) if known else (np.nan, np.nan)
    return {name: float(column[0]), f"{name}_low": low, f"{name}_high": high}


def _drawn(scores: Scores, seed: int) -> Means:
    """Means over all cases, and over draws of cases."""
    totals, counts = _sums(scores)
    return np.concatenate([(totals.sum(0) / counts.sum(0))[None], resampled_means(totals, counts, seed)])


def _at(
    knob: Float[NDArray[Any], " point"], curve: Float[NDArray[Any], "draw point metric"], point: int
) -> Float[NDArray[Any], "draw column"]:
    """Per draw the knob's value and the metrics of a point."""
    read = curve[:, point, len(MADE_OF) :]
    return np.concatenate([np.full((len(read), 1), knob[point]), read], axis=1)


def _read_off(
    knob: Float[NDArray[Any], " point"],
    curve: Float[NDArray[Any], "draw point metric"],
    efficacy: Float[NDArray[Any], " draw"],
) -> Float[NDArray[Any], "draw column"]:
    """Per draw the knob's value and the metrics where the curve first comes down to an efficacy; NaN if it does not."""
    own = np.stack([_efficacy(curve[:, point]) for point in range(len(knob))], axis=1)
    values = np.stack([_at(knob, curve, point) for point in range(len(knob))], axis=1)
    result = np.full((len(own), values.shape[2]), np.nan)
    starts_above = own[:, 0] >= efficacy
    for point in range(len(knob) - 1):
        above, below = own[:, point], own[:, point + 1]
        crosses = starts_above & np.isnan(result[:, 0]) & (above >= efficacy) & (below <= efficacy)
        drop = np.where(above > below, above - below, 1.0)
        part = np.where(above > below, (above - efficacy) / drop, 0.0)[crosses, None]
        result[crosses] = (1 - part) * values[crosses, point] + part * values[crosses, point + 1]
    return result
