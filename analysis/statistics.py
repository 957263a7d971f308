"""Intervals and comparisons of means over texts whose cases, not whose texts, are independent.

Every score is a ratio of sums over cases, ``sum(totals) / sum(counts)``: successes over texts, or losses over tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray

# The number of cases below which an interval says nothing.
LEAST_CASES = 3

RESAMPLES = 2000
BATCH_RESAMPLES = 100
PERMUTATIONS = 9999
BATCH_PERMUTATIONS = 500
EXACT = 12
TIE = 1e-13
NORMAL = 1.96

Array = NDArray[Any]


@dataclass(frozen=True)
class Interval:
    """A mean with two 95 % intervals.

    Attributes:
        mean: over all texts.
        low, high: of a bootstrap over cases, since texts of one case are not independent.
        half_width: the paper's interval is ``mean`` plus and minus this, 1.96 standard errors with all texts pooled as
            if they were independent; None where a mean over texts is not what is reported, or there is one text.
        n: number of cases.
        n_texts: number of texts.
    """

    mean: float
    low: float
    high: float
    half_width: float | None
    n: int
    n_texts: int


@dataclass(frozen=True)
class Difference:
    """A paired difference, first minus second, on the cases that both have.

    Attributes:
        mean: of the difference.
        low, high: its 95 % interval from a bootstrap over cases.
        p: two-sided, that each case's difference is as likely to have the other sign.
        n: number of cases.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int


def resampled_means(
    totals: Float[Array, "case metric"], counts: Float[Array, "case metric"], seed: int
) -> Float[Array, "resample metric"]:
    """``sum(totals) / sum(counts)`` of each metric in `RESAMPLES` draws of all cases with replacement.

    The draws are the same for every metric, so that metrics may be combined. NaN where a draw has no text of a metric.
    """
    rng = np.random.default_rng(seed)
    n = len(totals)
    means = []
    for _ in range(0, RESAMPLES, BATCH_RESAMPLES):
        drawn = rng.integers(n, size=(BATCH_RESAMPLES, n))
        # How often each case was drawn: sums are then products, whatever the number of metrics.
        often = np.bincount((drawn + n * np.arange(BATCH_RESAMPLES)[:, None]).ravel(), minlength=drawn.size)
        often = often.reshape(drawn.shape).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means.append((often @ totals) / (often @ counts))
    return np.concatenate(means)


def bootstrap(
    totals: Array,
    counts: Array,
    seed: int,
    statistic: Callable[[Float[Array, "resample metric"]], Float[Array, " resample"]] = lambda means: means[:, 0],
) -> tuple[float, float]:
    """95 % percentile interval when cases are drawn with replacement.

    Args:
        totals, counts: per case, or per case and metric.
        seed: of the draws.
        statistic: of the means of all metrics; the mean of the first metric by default.
    """
    shape = (len(totals), -1)
    means = resampled_means(totals.astype(np.float64).reshape(shape), counts.astype(np.float64).reshape(shape), seed)
    low, high = np.nanquantile(statistic(means), (0.025, 0.975))
    return float(low), float(high)


def grouped_intervals(frame: pd.DataFrame, by: Sequence[str], column: str, seed: int = 0) -> pd.DataFrame:
    """Mean of a column by group, over all its rows, with a bootstrap over cases.

    Args:
        frame: has ``case``, the columns ``by`` and ``column``.
        by: what rows are grouped by; groups are in order of appearance.
        column: of numbers.
        seed: of the draws.

    Returns:
        A row per group: the columns ``by``, ``mean``, ``low``, ``high``, ``n`` (texts), ``n_cases``.
    """
    rows = []
    for key, group in frame.groupby(list(by), sort=False):
        sums = group.groupby("case")[column].agg(["sum", "count"])
        low, high = bootstrap(sums["sum"].to_numpy(), sums["count"].to_numpy(), seed)
        row = dict(zip(by, key, strict=True)) | {"mean": group[column].mean(), "low": low, "high": high}
        rows.append(row | {"n": len(group), "n_cases": len(sums)})
    return pd.DataFrame(rows)


def percentiles(values: Sequence[float] | Array) -> tuple[float, float]:
    """The central 95 % of the draws that are defined; NaN where none is."""
    defined = np.asarray(values, dtype=np.float64)
    defined = defined[np.isfinite(defined)]
    if not len(defined):
        return np.nan, np.nan
    low, high = np.quantile(defined, (0.025, 0.975))
    return float(low), float(high)


def pooled_half_width(per_text: Array) -> float | None:
    """1.96 standard errors of the mean of all texts; None for a single text."""
    if len(per_text) < 2:
        return None
    return float(NORMAL * per_text.std(ddof=1) / np.sqrt(len(per_text)))


def sign_flip_p(differences: Float[Array, "case *metric"]) -> Float[Array, "*metric"]:
    """Two-sided p of the mean of each metric's per-case differences, by flipping the signs of whole cases.

    Exact for up to 12 cases; otherwise from `PERMUTATIONS` random flips, the same for every metric (TransformerLens's
    ``sign_flip_permutation_pvalue``, ten times as fast for thousands of cases).
    """
    n = len(differences)
    if n <= EXACT:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return np.asarray(_hits(bits, differences) / 2**n)
    rng = np.random.default_rng(0)
    hits = np.ones(differences.shape[1:])
    for start in range(0, PERMUTATIONS, BATCH_PERMUTATIONS):
        count = min(BATCH_PERMUTATIONS, PERMUTATIONS - start)
        drawn = np.unpackbits(rng.integers(256, size=(count, -(-n // 8)), dtype=np.uint8), axis=1)[:, :n]
        hits += _hits(drawn, differences)
    return np.asarray(hits / (PERMUTATIONS + 1))


def _hits(bits: Array, differences: Float[Array, "case *metric"]) -> Float[Array, "*metric"]:
    """In how many flips (1: the sign is kept) a metric's sum is at least as far from 0 as it was observed."""
    observed = np.abs(differences.sum(0))
    flipped = np.abs(2 * (bits.astype(np.float64) @ differences) - differences.sum(0))
    # Sums in another order differ by rounding; such ties count.
    return np.asarray((flipped >= observed - TIE * np.abs(differences).sum(0)).sum(0), dtype=np.float64)


def harmonic_mean(means: Float[Array, "resample metric"]) -> Float[Array, " resample"]:
    """Harmonic mean over metrics; 0 where one of them is 0."""
    with np.errstate(divide="ignore"):
        result: Array = means.shape[1] / (1 / means).sum(1)
    return result
