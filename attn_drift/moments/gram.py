"""Sums of ``k k^T`` over keys that come in batches, and solutions with them, in float64: one matrix per layer.

The upper triangle of the matrix holds the sum, which is half the work of both triangles; the lower one is free, and is
where a Cholesky factor is put while something is solved. So the sum is never copied and never changed by a solution.
"""

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import TypeVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.model.hooks import key_point, read
from attn_drift.model.loading import check_layer, check_model, float64_device, mlp_width
from attn_drift.model.tokens import Tokens, pad

# Rows of a matrix that are worked on together.
BLOCK = 512

# Of a batch, padding included: its keys in float64 are small beside the matrix that they are added to.
BATCH_TOKENS = 2048

_Window = TypeVar("_Window", bound=Sized)


class Gram:
    """A sum of ``k k^T``.

    Attributes:
        matrix: on and above its diagonal the sum; below it nothing that has a meaning.
        n: how many keys were added.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.matrix: Float64[Tensor, "d_mlp d_mlp"] = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.n = 0

    def add(self, keys: Float[Tensor, "token d_mlp"]) -> None:
        """Adds ``k k^T`` of every key."""
        keys = keys.to(self.matrix)
        for rows, _ in self._blocks():
            self.matrix[rows, rows.start :].addmm_(keys[:, rows].T, keys[:, rows.start :])
        self.n += len(keys)

    def solve(self, right: Float64[Tensor, "d_mlp m"], ridge: float) -> Float64[Tensor, "d_mlp m"]:
        """``(C + ridge * mean(diag C) * I)^-1 @ right`` for the mean ``C`` of what was added.

        Raises:
            ValueError: the matrix with its ridge is not positive definite.
        """
        A, corners = self.matrix, self._factor(ridge)
        solved = right * self.n  # the factor is of the sum
        blocks = list(zip(self._blocks(), corners, strict=True))
        for (rows, _), corner in blocks:
            rest = solved[rows] - A[rows, : rows.start] @ solved[: rows.start]
            solved[rows] = torch.linalg.solve_triangular(corner, rest, upper=False)
        for (rows, below), corner in reversed(blocks):
            rest = solved[rows] - A[below, rows].T @ solved[below]
            solved[rows] = torch.linalg.solve_triangular(corner.T, rest, upper=True)
        return solved

    def mean_(self) -> Float64[Tensor, "d_mlp d_mlp"]:
        """The mean of what was added, both triangles, in place of the sum."""
        for rows, below in self._blocks():
            corner = self.matrix[rows, rows]
            corner.copy_(corner.triu() + corner.triu(1).T)
            self.matrix[below, rows] = self.matrix[rows, below].T
        return self.matrix.div_(self.n)

    def _factor(self, ridge: float) -> list[Float64[Tensor, "block block"]]:
        """Cholesky by block columns: blocks on the diagonal are returned, those below it are left in the matrix."""
        A = self.matrix
        shift, corners = ridge * A.diagonal().mean(), []
        for rows, below in self._blocks():
            left, panel = A[rows, : rows.start], A[below, rows]
            corner = A[rows, rows] - left @ left.T
            corner.diagonal().add_(shift)
            corner, failed = torch.linalg.cholesky_ex(corner)
            if failed or not torch.isfinite(corner).all():
                raise ValueError(f"the sum over {self.n} keys is not positive definite with a ridge of {ridge:g}")
            panel.copy_(A[rows, below].T).addmm_(A[below, : rows.start], left.T, alpha=-1)
            panel.copy_(torch.linalg.solve_triangular(corner.T, panel, upper=True, left=False))
            corners.append(corner)
        return corners

    def _blocks(self) -> list[tuple[slice, slice]]:
        """Per block of rows the rows, and those below them."""
        width = len(self.matrix)
        stops = [min(start + BLOCK, width) for start in range(0, width, BLOCK)]
        return [(slice(i * BLOCK, stop), slice(stop, width)) for i, stop in enumerate(stops)]


class KeySums:
    """Sums of ``k k^T`` of several layers over the same texts: one pass of the model, one matrix per layer.

    Attributes:
        grams: the sums by layer.

    Raises:
        ValueError: a model that cannot be edited, no layers, one given twice, or one out of range.
    """

    def __init__(self, model: TransformerBridge, layers: Sequence[int]) -> None:
        check_model(model)
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(f"the layers are {list(layers)}; expected at least one, and each once")
        for layer in layers:
            check_layer(model, layer)
        self.model = model
        self.grams = {layer: Gram(mlp_width(model, layer), float64_device(model)) for layer in layers}

    @property
    def n_tokens(self) -> int:
        return next(iter(self.grams.values())).n

    def add(self, batch: Sequence[Tokens]) -> dict[int, Float[Tensor, "token d_mlp"]]:
        """Adds every token of a batch, and returns the keys by layer."""
        tokens = pad(self.model, batch)
        points = {layer: key_point(layer) for layer in self.grams}
        found = read(self.model, tokens, list(points.values()), stop_at_layer=max(points) + 1)
        keys = {layer: found.pop(point)[tokens.mask] for layer, point in points.items()}
        for layer, gram in self.grams.items():
            gram.add(keys[layer])
        return keys


def batches(windows: Iterable[_Window]) -> Iterator[list[_Window]]:
    """Groups tokenized texts, in their order, into batches of at most ``BATCH_TOKENS`` with padding, or of one."""
    batch: list[_Window] = []
    for window in windows:
        if batch and (len(batch) + 1) * max(map(len, [*batch, window])) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
