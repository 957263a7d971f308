"""Second moments of keys, ``C = E[k k^T]`` (uncentred): what other keys a weight serves.

Accumulated and solved in float64 (method.md, section 4).
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.files import cache_path, keeping, replacing
from attn_drift.hooks import is_hooked, key_point, read
from attn_drift.models import check_layer, check_model, fingerprint, float64_device, mlp_width, origin
from attn_drift.sampling import sample_documents
from attn_drift.tokens import Tokens, encode_windows, pad

log = logging.getLogger(__name__)

FORMAT = "attn_drift.moment.1"
TEXTS_AT_ONCE = 32

# What `sampled_moment` takes: at least this many tokens, and several for every dimension of a key.
SAMPLED_TOKENS = 50_000
SAMPLED_TOKENS_PER_KEY = 8
SAMPLED_LENGTH = 64


@dataclass(frozen=True, eq=False)
class FactoredMoment:
    """Cholesky factors of a second moment with its ridge.

    Attributes:
        factor: lower triangular.
    """

    factor: Float64[Tensor, "d_mlp d_mlp"]

    def solve(self, keys: Float[Tensor, "d_mlp n"]) -> Float64[Tensor, "d_mlp n"]:
        """``(C + ridge)^-1 @ keys``."""
        return torch.cholesky_solve(keys.double(), self.factor)


@dataclass(frozen=True, eq=False, repr=False)
class SecondMoment:
    """The second moment of the keys of one layer.

    Attributes:
        layer: whose keys.
        matrix: ``C``, symmetric, in float64.
        n_tokens: how many keys were averaged.
        fingerprint: of the model.
    """

    layer: int
    matrix: Float[Tensor, "d_mlp d_mlp"]
    n_tokens: int
    fingerprint: str
    _factors: dict[tuple[float, str], FactoredMoment] = field(default_factory=dict, init=False)
    _null_spaces: dict[tuple[float, str], Tensor] = field(default_factory=dict, init=False)

    def __repr__(self) -> str:
        return f"SecondMoment(L{self.layer}, {len(self.matrix)} x {len(self.matrix)}, {self.n_tokens} tokens)"

    def factored(self, ridge: float, device: torch.device) -> "FactoredMoment":
        """Cholesky factors of ``C + ridge * mean(diag C) * I``: made once, kept for any number of solutions.

        Raises:
            ValueError: the matrix with its ridge is not positive definite.
        """
        key = (ridge, str(device))
        if key not in self._factors:
            matrix = self.matrix.to(device, copy=True)
            matrix.diagonal().add_(ridge * matrix.diagonal().mean())
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if failed or not torch.isfinite(factor).all():
                raise ValueError(
                    f"the second moment of layer {self.layer} ({self.n_tokens} tokens for {len(matrix)} dimensions) is "
                    f"not positive definite with a ridge of {ridge:g} of its mean diagonal: take it over more text, or "
                    "raise the ridge"
                )
            self._factors[key] = FactoredMoment(factor)
        return self._factors[key]

    def null_space(self, threshold: float, device: torch.device) -> Float64[Tensor, "d_mlp null"]:
        """An orthonormal basis of the directions in which ``C`` has eigenvalues below a threshold: made once, and kept.

        Raises:
            ValueError: there are none.
        """
        key = (threshold, str(device))
        if key not in self._null_spaces:
            eigenvalues, vectors = torch.linalg.eigh(self.matrix.to(device))
            if eigenvalues[0] >= threshold:
                raise ValueError(
                    f"the second moment of layer {self.layer} has no eigenvalue below {threshold:g}; they go from "
                    f"{float(eigenvalues[0]):.2g} to {float(eigenvalues[-1]):.2g}: raise the threshold"
                )
            self._null_spaces[key] = vectors[:, eigenvalues < threshold].contiguous()
        return self._null_spaces[key]

    def check_fits(self, model: TransformerBridge, layer: int) -> None:
        """Raises a ValueError for a moment of another layer, shape or model, or one not finite and symmetric."""
        width = mlp_width(model, layer)
        if self.layer != layer:
            raise ValueError(f"the second moment is of layer {self.layer}, but layer {layer} is edited")
        if tuple(self.matrix.shape) != (width, width):
            raise ValueError(
                f"the second moment has shape {list(self.matrix.shape)}; layer {layer} needs {[width] * 2}"
            )
        if self.matrix.dtype != torch.float64:
            raise ValueError(
                f"the second moment is in {self.matrix.dtype}; expected float64, as second_moment makes it"
            )
        if self.fingerprint != fingerprint(model):
            raise ValueError(
                f"the second moment was taken with the weights {self.fingerprint[:8]}, but those of "
                f"{model.cfg.model_name} are {fingerprint(model)[:8]} (another model or dtype, or an edit was written "
                "since); take it again"
            )
        if not torch.isfinite(self.matrix).all() or not torch.allclose(self.matrix, self.matrix.T, rtol=1e-6):
            raise ValueError(f"the second moment of layer {layer} is not a finite symmetric matrix; take it again")

    def save(self, path: str | Path) -> None:
        """Writes the moment as a safetensors file."""
        metadata = {
            "format": FORMAT,
            "layer": str(self.layer),
            "n_tokens": str(self.n_tokens),
            "fingerprint": self.fingerprint,
        }
        with replacing(Path(path)) as temporary:
            save_file({"matrix": self.matrix.cpu().contiguous()}, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> "SecondMoment":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or no second moment.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no second moment {Path(path).absolute()}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, expected {FORMAT!r}")
                matrix = file.get_tensor("matrix").double()
                return cls(int(metadata["layer"]), matrix, int(metadata["n_tokens"]), metadata["fingerprint"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no second moment: {error}") from error


def second_moment(model: TransformerBridge, layer: int, texts: str | Iterable[str | Tokens]) -> SecondMoment:
    """Averages ``k k^T`` over every token of the texts.

    Texts longer than the model's context are cut into windows; tokenized ones are taken as they are.

    Raises:
        ValueError: a model that cannot be edited, layer out of range, no texts, or an empty text.
    """
    check_model(model)
    check_layer(model, layer)
    width = mlp_width(model, layer)
    total = torch.zeros(width, width, dtype=torch.float64, device=float64_device(model))
    n_tokens = 0
    for batch in _batches(model, [texts] if isinstance(texts, str) else texts):
        tokens = pad(model, batch)
        point = key_point(layer)
        keys = read(model, tokens, [point], stop_at_layer=layer + 1)[point][tokens.mask].to(total.device).double()
        total += keys.T @ keys
        n_tokens += len(keys)
    if not n_tokens:
        raise ValueError("no texts were given; a second moment needs several tokens for every dimension of a key")
    return SecondMoment(layer, total / n_tokens, n_tokens, fingerprint(model))


def sampled_moment(model: TransformerBridge, layer: int, seed: int = 0) -> SecondMoment:
    """The second moment over text sampled from the model itself: needs no data set, approximates its training text.

    Cached, keyed by all that it depends on, but not where hooks are attached (an edit in effect).
    """
    check_layer(model, layer)
    n_tokens = max(SAMPLED_TOKENS, SAMPLED_TOKENS_PER_KEY * mlp_width(model, layer))
    length = min(SAMPLED_LENGTH, model.cfg.n_ctx)
    key = {**origin(model), "layer": layer, "seed": seed, "n_tokens": n_tokens, "length": length}
    path = cache_path("moments", ".safetensors", key)
    if path.is_file() and not is_hooked(model):
        try:
            return SecondMoment.load(path)
        except ValueError as error:
            log.warning("%s; it is made anew", error)
    moment = second_moment(model, layer, sample_documents(model, n_tokens, length, seed))
    if not is_hooked(model):
        with keeping():
            moment.save(path)
    return moment


def _batches(model: TransformerBridge, texts: Iterable[str | Tokens]) -> Iterator[list[Tokens]]:
    stream = (window for text in texts for window in (encode_windows(model, text) if isinstance(text, str) else [text]))
    while batch := list(islice(stream, TEXTS_AT_ONCE)):
        yield batch
