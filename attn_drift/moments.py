"""Second moments of keys, ``C = E[k k^T]`` (uncentred): what other keys a weight serves.

Accumulated and solved in float64 (method.md, section 4).
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, sqrt
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.accumulation import KeySums, batches
from attn_drift.changes import exclusive
from attn_drift.files import cache_path, keeping, replacing
from attn_drift.hooks import is_hooked
from attn_drift.models import down_projection, fingerprint, float64_device, mlp_width, origin
from attn_drift.rome_stats import read_rome_stats
from attn_drift.sampling import sample_documents
from attn_drift.tokens import Tokens, encode_windows
from attn_drift.weights import LowRankUpdate

log = logging.getLogger(__name__)

FORMAT = "attn_drift.moment.1"

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
        source: where it comes from, for people: names of the model and the text, and the like.
    """

    layer: int
    matrix: Float[Tensor, "d_mlp d_mlp"]
    n_tokens: int
    fingerprint: str
    source: Mapping[str, str] = field(default_factory=dict)
    _factors: dict[tuple[float, str], FactoredMoment] = field(default_factory=dict, init=False)
    _null_spaces: dict[tuple[float, str], Tensor] = field(default_factory=dict, init=False)
    _sizes: dict[tuple[int, int], float] = field(default_factory=dict, init=False)

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

    def leakage(self, model: TransformerBridge, update: LowRankUpdate) -> float:
        """How much an update changes the values of the text's keys, in units of those values (root mean squares).

        ``sqrt(E|k Delta|^2 / E|k W|^2)``: near 0 for an update that only its own keys see, above 1 for one that drowns
        what the layer did.
        """
        weight = down_projection(model, self.layer).detach()
        state = (weight.data_ptr(), weight._version)
        if state not in self._sizes:
            wide = weight.to(self.matrix)
            self._sizes[state] = float(((self.matrix @ wide) * wide).sum())
        keys, values = update.keys.to(self.matrix), update.values.to(self.matrix)
        change = float(((keys @ self.matrix @ keys.T) * (values @ values.T)).sum())
        size = self._sizes[state]
        return sqrt(change / size) if size > 0 and change > 0 else 0.0 if change <= 0 else inf

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
            **self.source,
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
                if metadata.pop("format", None) != FORMAT:
                    raise ValueError(f"it is not of the format {FORMAT!r}")
                layer, n_tokens = int(metadata.pop("layer")), int(metadata.pop("n_tokens"))
                mark = metadata.pop("fingerprint")
                return cls(layer, file.get_tensor("matrix").double(), n_tokens, mark, metadata)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no second moment: {error}") from error

    @classmethod
    def from_rome_npz(cls, path: str | Path, model: TransformerBridge, layer: int) -> "SecondMoment":
        """Imports a file of second moments of ROME and MEMIT (``*_mom2_*.npz``); nothing in it is unpickled.

        Such a file names neither its model nor its layer: it is taken to be of these, which is logged. Published ones
        were accumulated in float32.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or no such file, or the layer has keys of another width.
        """
        width = mlp_width(model, layer)
        matrix, count = read_rome_stats(path, width)
        log.warning(
            "%s does not say of which model and layer it is; it is taken to be of layer %d of %s, with the weights as "
            "they are now",
            path,
            layer,
            model.cfg.model_name,
        )
        source = {"model": str(model.cfg.model_name), "text": f"imported from {Path(path).name}"}
        return cls(layer, matrix.to(float64_device(model)), count, fingerprint(model), source)


@exclusive
def second_moments(
    model: TransformerBridge, layers: Sequence[int], texts: str | Iterable[str | Tokens]
) -> dict[int, SecondMoment]:
    """Averages ``k k^T`` over every token of the texts, for all layers in one pass.

    Texts longer than the model's context are cut into windows; tokenized ones are taken as they are.

    Raises:
        ValueError: a model that cannot be edited, a bad layer, no texts, or an empty text.
    """
    sums = KeySums(model, layers)
    given = [texts] if isinstance(texts, str) else texts
    windows = (w for text in given for w in (encode_windows(model, text) if isinstance(text, str) else [text]))
    for batch in batches(windows):
        sums.add(batch)
    if not sums.n_tokens:
        raise ValueError("no texts were given; a second moment needs several tokens for every dimension of a key")
    return means_(sums)


def means_(sums: KeySums, source: Mapping[str, str] | None = None) -> dict[int, SecondMoment]:
    """The second moments of sums, in place of these, to which nothing can be added any more."""
    mark = fingerprint(sums.model)
    return {layer: SecondMoment(layer, gram.mean_(), gram.n, mark, source or {}) for layer, gram in sums.grams.items()}


def second_moment(model: TransformerBridge, layer: int, texts: str | Iterable[str | Tokens]) -> SecondMoment:
    """`second_moments` of one layer."""
    return second_moments(model, [layer], texts)[layer]


@exclusive
def sampled_moments(model: TransformerBridge, layers: Sequence[int], seed: int = 0) -> dict[int, SecondMoment]:
    """Second moments over text sampled from the model itself: needs no data set, approximates its training text.

    Cached by layer, keyed by all that each depends on, but not where hooks are attached (an edit in effect). The text
    is sampled once for all layers that the cache lacks.
    """
    length = min(SAMPLED_LENGTH, model.cfg.n_ctx)
    sizes = {layer: max(SAMPLED_TOKENS, SAMPLED_TOKENS_PER_KEY * mlp_width(model, layer)) for layer in layers}
    identity = {**origin(model), "seed": seed, "length": length}
    paths = {
        layer: cache_path("moments", ".safetensors", {**identity, "layer": layer, "n_tokens": n_tokens})
        for layer, n_tokens in sizes.items()
    }
    found = {} if is_hooked(model) else {layer: held for layer, path in paths.items() if (held := _cached(path))}
    for n_tokens in set(sizes.values()):
        missing = [layer for layer in layers if layer not in found and sizes[layer] == n_tokens]
        if missing:
            made = second_moments(model, missing, sample_documents(model, n_tokens, length, seed))
            found |= made
            if not is_hooked(model):
                for layer, moment in made.items():
                    with keeping():
                        moment.save(paths[layer])
    return {layer: found[layer] for layer in layers}


def sampled_moment(model: TransformerBridge, layer: int, seed: int = 0) -> SecondMoment:
    """`sampled_moments` of one layer."""
    return sampled_moments(model, [layer], seed)[layer]


def _cached(path: Path) -> SecondMoment | None:
    if not path.is_file():
        return None
    try:
        return SecondMoment.load(path)
    except ValueError as error:
        log.warning("%s; it is made anew", error)
        return None
