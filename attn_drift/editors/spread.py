"""Values spread over several layers: what MEMIT, PMET and AlphaEdit share (method.md, section 4).

    R_l = (Z - Z_now) / share(layers left),   Delta_l = R_l D_l^T      for each layer l in order

Z is the activation at the site of the last edited layer and the subject-last token, plus the optimized delta; Z_now and
the keys, from which an editor makes its directions D_l, are read anew after each layer. A request of several wordings
has a column for each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.editors.base import at_subjects
from attn_drift.edits.low_rank import LowRankUpdate, MaskedUpdate
from attn_drift.model.hooks import Hook, hooks_attached, key_point, low_rank_update_hooks
from attn_drift.model.loading import float64_device
from attn_drift.prompts import RequestPrompts, RewritingPrompt
from attn_drift.values.forward_passes import Deltas

# Texts that are read in one run.
BATCH_ROWS = 256

Keys = Float64[Tensor, "d_mlp n"]
# What an editor makes of the keys that are written into a layer together: one direction in key space for each.
Directions = Callable[[int, Keys], Keys]


@dataclass(frozen=True, eq=False)
class Site:
    """Where a value is read, and how the layers share what is left of it.

    Attributes:
        point: the hook point of Z, in the last edited layer.
        share: of the number of layers left, this one included: by what the rest is divided.
        carries: whether what an earlier layer adds arrives there, as it does in the residual stream.
    """

    point: str
    share: Callable[[int], float]
    carries: bool


@dataclass(frozen=True, eq=False)
class LayerUpdate:
    """The update of one layer, with one rank for each column.

    Attributes:
        directions: in key space.
        residuals: what each adds.
        target_keys: the key that each maps.
    """

    directions: Float[Tensor, "column d_mlp"]
    residuals: Float[Tensor, "column d_model"]
    target_keys: Float[Tensor, "column d_mlp"]


class Spread:
    """The updates that write optimized values into several layers.

    Args:
        model: the model.
        batches: requests that are written together, by batch; batches do not see each other.
        layers: the edited layers, ascending.
        directions: the editor's.
        site: where values are read.
    """

    def __init__(
        self,
        model: TransformerBridge,
        batches: Sequence[Sequence[RequestPrompts]],
        layers: Sequence[int],
        directions: Directions,
        site: Site,
    ) -> None:
        self.model, self.layers, self.directions, self.site = model, layers, directions, site
        requests = [texts for batch in batches for texts in batch]
        columns = [(r, rows) for r, texts in enumerate(requests) for rows in _by_wording(texts)]
        batch_of = [b for b, batch in enumerate(batches) for _ in batch]
        self.rows = [text for _, own in columns for text in own]
        self.lengths = [len(own) for _, own in columns]
        device = float64_device(model)
        # Of each column its request, its batch, and the row of its context-free text.
        self.request: Int[Tensor, " column"] = torch.tensor([r for r, _ in columns], device=device)
        self.batch: Int[Tensor, " column"] = torch.tensor([batch_of[r] for r, _ in columns], device=device)
        self.alone: Int[Tensor, " column"] = torch.tensor([0, *self.lengths[:-1]], device=device).cumsum(0)
        self.row_batch = self.batch.repeat_interleave(torch.tensor(self.lengths, device=device))
        self.request_batch = torch.tensor(batch_of, device=device)
        self.n_batches = len(batches)
        self.together: Bool[Tensor, "column column"] = self.batch[:, None] == self.batch
        # Before the first layer is written nothing depends on the values.
        self.vanilla = self._read(layers[0], {})
        self.first = self._solved(layers[0], self.vanilla[0])

    def of(self, deltas: Deltas) -> dict[int, LayerUpdate]:
        """The update of every layer, from deltas of all requests; those at the first site are written.

        Exact in value. Its gradient takes an update of an earlier layer to arrive at the site as it is, and keys and
        directions to be fixed.
        """
        delta = deltas[self.request, 0]
        target = self.vanilla[1].to(delta) + delta.detach()
        found: dict[int, LayerUpdate] = {}
        eye = torch.eye(len(delta), dtype=delta.dtype, device=delta.device)
        # What of each column's delta has arrived at each column's site.
        arrived = torch.zeros_like(eye)
        for i, layer in enumerate(self.layers):
            keys, now = self.vanilla if i == 0 else self._read(layer, found)
            mean, directions = self.first if i == 0 else self._solved(layer, keys)
            share = self.site.share(len(self.layers) - i)
            linear = (eye - arrived) / share
            residuals = (target - now.to(delta)) / share + linear @ (delta - delta.detach())
            if self.site.carries:
                gains = (keys[self.alone].double() @ directions).to(delta)
                arrived = arrived + (gains * self.together) @ linear
            found[layer] = LayerUpdate(directions.T.to(delta), residuals, mean.T.to(delta))
        return found

    def _solved(self, layer: int, keys: Float[Tensor, "row d_mlp"]) -> tuple[Keys, Keys]:
        """The mean key of each column, and its direction."""
        mean = torch.stack([own.double().mean(0) for own in torch.split(keys, self.lengths)], dim=1)
        directions = torch.zeros_like(mean)
        for own in self._members():
            directions[:, own] = self.directions(layer, mean[:, own]).to(mean)
        return mean, directions

    def by_batch(self, found: Mapping[int, LayerUpdate]) -> list[dict[int, LowRankUpdate]]:
        """By batch, the update of every layer."""
        return [
            {
                layer: LowRankUpdate(*(part[own].detach().cpu() for part in (u.directions, u.residuals, u.target_keys)))
                for layer, u in found.items()
            }
            for own in self._members()
        ]

    def by_request(self, found: Mapping[int, LayerUpdate]) -> dict[int, MaskedUpdate]:
        """The updates as each request sees them."""
        return self._masked_by(found, self.request_batch)

    def _members(self) -> list[Int[Tensor, " own"]]:
        """The columns of each batch."""
        return [(self.batch == b).nonzero()[:, 0] for b in range(self.n_batches)]

    def _masked_by(self, found: Mapping[int, LayerUpdate], batch: Int[Tensor, " row"]) -> dict[int, MaskedUpdate]:
        """The updates of each row's own batch."""
        seen = batch[:, None] == self.batch
        return {layer: MaskedUpdate(update.directions, update.residuals, seen) for layer, update in found.items()}

    def _read(
        self, layer: int, found: Mapping[int, LayerUpdate]
    ) -> tuple[Float[Tensor, "row d_mlp"], Float[Tensor, "column d_model"]]:
        """Keys of ``layer`` in all texts, and the site's activation in the context-free ones, under updates."""
        points = [key_point(layer), self.site.point]
        read: list[list[Tensor]] = []
        seen = self._masked_by(found, self.row_batch)
        for start in range(0, len(self.rows), BATCH_ROWS):
            own = slice(start, start + BATCH_ROWS)
            hooks: list[Hook] = []
            for done, update in seen.items():
                rows = update.of(torch.arange(len(self.rows))[own])
                hooks += low_rank_update_hooks(done, rows.keys.detach(), rows.values.detach(), rows.seen)
            with hooks_attached(self.model, hooks):
                read.append(at_subjects(self.model, points, self.rows[own], self.layers[-1] + 1))
        keys, site = (torch.cat([part[i] for part in read]).to(self.alone.device) for i in range(2))
        return keys, site[self.alone]


def _by_wording(request: RequestPrompts) -> list[list[RewritingPrompt]]:
    """The texts of each wording, the context-free one first."""
    found: list[list[RewritingPrompt]] = [[] for _ in request.request.wordings]
    for text in request.rewriting:
        found[text.wording].append(text)
    return found
