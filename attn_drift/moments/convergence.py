"""Whether a second moment has seen enough text: how the direction solved with it changes as tokens double.

For some probe keys ``k`` of a layer the direction ``w = C^-1 k / (k^T C^-1 k)``, which is what ROME writes with, is
solved whenever the number of tokens has doubled.
"""

import logging
from collections.abc import Mapping
from itertools import pairwise

import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from attn_drift.moments.gram import Gram

log = logging.getLogger(__name__)

N_PROBES = 8
RIDGE = 1e-4

# A relative change per doubling below which more text is not worth its time.
THRESHOLD = 0.01

# A last check after fewer tokens than this many times those before it is no doubling.
DOUBLING = 1.5


class Convergence:
    """Directions solved at checks.

    Attributes:
        probes: by layer the probe keys: some of the first batch, evenly spaced.
        tokens: seen at each check.
        solved: by layer the directions of every check.
    """

    def __init__(self) -> None:
        self.probes: dict[int, Float64[Tensor, "d_mlp probe"]] = {}
        self.tokens: list[int] = []
        self.solved: dict[int, list[Float64[Tensor, "d_mlp probe"]]] = {}

    def choose(self, keys: Mapping[int, Float[Tensor, "token d_mlp"]]) -> None:
        """Takes the probes from keys by layer, unless there are some already."""
        for layer, found in keys.items() if not self.probes else ():
            places = torch.linspace(0, len(found) - 1, min(N_PROBES, len(found))).long()
            self.probes[layer] = found[places.to(found.device)].T.double().cpu().contiguous()
            self.solved[layer] = []

    def check(self, grams: Mapping[int, Gram]) -> None:
        """Solves for the probes of every layer; where the sum is not positive definite yet, the direction is NaN."""
        for layer, gram in grams.items():
            probes = self.probes[layer].to(gram.matrix)
            try:
                solved = gram.solve(probes, RIDGE)
            except ValueError as error:
                log.warning("convergence of layer %d is not known yet: %s", layer, error)
                solved = torch.full_like(probes, torch.nan)
            self.solved[layer].append((solved / (solved * probes).sum(0)).cpu())
        self.tokens.append(next(iter(grams.values())).n)

    def frame(self) -> pd.DataFrame:
        """A row per check and layer.

        Columns: ``tokens``, ``layer``, ``change`` (relative change of the direction since the check before, averaged
        over the probes; NaN at the first) and ``to_last`` (relative distance to the direction of the last check).
        """
        rows = []
        for layer, solved in self.solved.items():
            before = [torch.full_like(self.probes[layer], torch.nan), *solved]
            for n, old, new in zip(self.tokens, before, solved, strict=False):
                rows.append((n, layer, _relative(new - old, new), _relative(solved[-1] - new, solved[-1])))
        return pd.DataFrame(rows, columns=["tokens", "layer", "change", "to_last"])


def _relative(difference: Float64[Tensor, "d_mlp probe"], direction: Float64[Tensor, "d_mlp probe"]) -> float:
    return float((difference.norm(dim=0) / direction.norm(dim=0)).mean())


def doublings(n_tokens: int, least: int) -> list[int]:
    """When to check: at ``n_tokens``, half of them, a quarter, and so on, but not below ``least`` again."""
    targets = [n_tokens]
    while targets[0] >= 2 * least:
        targets.insert(0, -(-targets[0] // 2))
    return targets


def sufficient(frame: pd.DataFrame, threshold: float = THRESHOLD) -> int | None:
    """The number of tokens from which on the change per doubling is below a threshold in every layer.

    Args:
        frame: from `Convergence.frame`.
        threshold: of the change.

    Returns:
        None where the last doubling still changed more.
    """
    worst = frame.groupby("tokens")["change"].max()
    doubled = [n for before, n in pairwise(worst.index) if n >= DOUBLING * before]
    enough = None
    for n in reversed(doubled):
        if not worst[n] < threshold:
            break
        enough = int(n)
    return enough


def expected(frame: pd.DataFrame, threshold: float = THRESHOLD) -> int | None:
    """The number of tokens at which the change per doubling should come below a threshold: an estimate.

    The error of an average over ``n`` tokens, and so the change per doubling, falls with the square root of ``n``.

    Args:
        frame: from `Convergence.frame`.
        threshold: of the change.

    Returns:
        None where there is no change to go by.
    """
    known = frame.dropna(subset="change")
    if known.empty:
        return None
    last = known[known["tokens"] == known["tokens"].max()]
    return int(last["tokens"].max() * (last["change"].max() / threshold) ** 2)
