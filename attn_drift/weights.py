"""Low-rank updates of down-projections, written into weights and taken out again, bit for bit."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.models import down_projection, fingerprint


@dataclass(frozen=True, eq=False, repr=False)
class LowRankUpdate:
    """A change of one down-projection: its output gains ``(k @ keys.T) @ values``.

    Attributes:
        keys: directions in key space.
        values: what each adds to the MLP's output.
        served: the keys that an edit was to map, which later edits may spare; None where an editor does not tell.
    """

    keys: Float[Tensor, "rank d_mlp"]
    values: Float[Tensor, "rank d_model"]
    served: Float[Tensor, "n d_mlp"] | None = None

    @property
    def rank(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"LowRankUpdate(rank {self.rank}, {self.keys.shape[1]} -> {self.values.shape[1]})"

    def to(self, device: torch.device) -> "LowRankUpdate":
        """What is added, on a device; the keys that are served stay where they are."""
        return LowRankUpdate(self.keys.to(device), self.values.to(device), self.served)

    def delta(self) -> Float[Tensor, "d_mlp d_model"]:
        """The change of the weight ``W``, where ``v = k @ W``."""
        return self.keys.T @ self.values

    def norm(self) -> Float[Tensor, ""]:
        """Frobenius norm of `delta`, in float64, without making it."""
        keys, values = self.keys.double(), self.values.double()
        return ((keys @ keys.T) * (values @ values.T)).sum().clamp(min=0).sqrt()

    def added_to(self, weight: Float[Tensor, "d_mlp d_model"]) -> Float[Tensor, "d_mlp d_model"]:
        """The weight with the update, summed in the wider of both dtypes; the given one is left as it is."""
        delta = self.delta().to(weight.device)
        dtype = torch.promote_types(weight.dtype, delta.dtype)
        return (weight.to(dtype) + delta).to(weight.dtype)


def concatenated(updates: Sequence[LowRankUpdate]) -> LowRankUpdate:
    """The updates of one layer as one, of the sum of their ranks."""
    served = [update.served for update in updates if update.served is not None]
    return LowRankUpdate(
        torch.cat([update.keys for update in updates]),
        torch.cat([update.values for update in updates]),
        torch.cat(served) if len(served) == len(updates) else None,
    )


@dataclass(frozen=True, eq=False)
class SeenUpdate:
    """A low-rank update of one layer, and which of its ranks are in effect for each request."""

    keys: Float[Tensor, "rank d_mlp"]
    values: Float[Tensor, "rank d_model"]
    seen: Bool[Tensor, "request rank"]

    def of(self, requests: Int[Tensor, " own"]) -> "SeenUpdate":
        """As some of the requests see it, in any order and number; ranks that none of them sees are left out."""
        seen = self.seen[requests.to(self.seen.device)]
        ranks = seen.any(0)
        return SeenUpdate(self.keys[ranks], self.values[ranks], seen[:, ranks])


@dataclass
class WrittenLayer:
    """The weight of one layer as it was, and the updates written into it since, in order and safe from changes."""

    original: Float[Tensor, "d_mlp d_model"]
    updates: dict[Any, LowRankUpdate] = field(default_factory=dict)

    def add(self, model: TransformerBridge, layer: int, edit: object, update: LowRankUpdate) -> None:
        self.updates[edit] = LowRankUpdate(update.keys.clone(), update.values.clone())
        self._write(model, layer)

    def remove(self, model: TransformerBridge, layer: int, edit: object) -> None:
        del self.updates[edit]
        self._write(model, layer)

    def check_untouched(self, model: TransformerBridge, layer: int) -> None:
        weight = down_projection(model, layer)
        if weight.dtype != self.original.dtype:
            raise RuntimeError(
                f"the model was cast from {self.original.dtype} to {weight.dtype} since the edit was written; cast it "
                "back before removing the edit"
            )
        if not torch.equal(weight, self._expected(weight.device)):
            raise RuntimeError(
                f"the down-projection of layer {layer} was changed by something else since the edit was written; "
                "to go on would lose that change, so nothing was done"
            )

    def _expected(self, device: torch.device) -> Float[Tensor, "d_mlp d_model"]:
        weight = self.original.to(device)
        for update in self.updates.values():
            weight = update.added_to(weight)
        return weight

    def _write(self, model: TransformerBridge, layer: int) -> None:
        weight = down_projection(model, layer)
        with torch.no_grad():
            weight.copy_(self._expected(weight.device))


@dataclass
class WrittenModel:
    """What was written into a model: its fingerprints before each writing, and per layer the updates."""

    fingerprints: set[str] = field(default_factory=set)
    layers: dict[int, WrittenLayer] = field(default_factory=dict)


written: WeakKeyDictionary[TransformerBridge, WrittenModel] = WeakKeyDictionary()


def identities(model: TransformerBridge) -> set[str]:
    """Fingerprints of the model: as it is, and as it was before each edit that was written into it."""
    return {fingerprint(model)} | (written[model].fingerprints if model in written else set())
