"""Values written into several layers: what MEMIT and AlphaEdit share (method.md, section 4).

    R_l = (Z - Z_now) / (layers left),   Delta_l = R_l D_l^T      for each layer l in order

Z is the residual stream after the last edited layer at the subject-last token, plus the optimised delta; Z_now and the
keys, from which an editor makes its directions D_l, are read anew after each layer. A request of several wordings has a
column for each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.editors.shared import Lengths, at_subjects
from attn_drift.hooks import attached, key_point, stream_point, updating
from attn_drift.models import check_finite, check_layer, check_model
from attn_drift.moments import SecondMoment
from attn_drift.rewriting import RequestTexts, RewritingText
from attn_drift.values import OptimisedValue, ValueConfig
from attn_drift.weights import LowRankUpdate

# Of MEMIT's context templates: five of ten tokens, one for each first word.
MEMIT_LENGTHS: Lengths = ((10, 1),)

Keys = Float64[Tensor, "d_mlp n"]
# What an editor makes of a layer's keys: one direction in key space for each.
Directions = Callable[[int, Keys], Keys]


@dataclass(frozen=True, kw_only=True)
class SpreadConfig(ValueConfig):
    """How a value is optimised, and which layers it is written into.

    Attributes:
        layers: the edited layers, in ascending order.
        context_lengths: of the contexts that are sampled when none are handed in, see `sample_contexts`.
    """

    layers: tuple[int, ...]
    clamp: float = 0.75
    context_lengths: Lengths = MEMIT_LENGTHS

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"the layers are {self.layers}; expected at least one, ascending, each once")


def check_layers(model: TransformerBridge, layers: Sequence[int]) -> None:
    """Raises a ValueError for a model that cannot be edited, a layer that it lacks, or a weight that is not finite."""
    check_model(model)
    for layer in layers:
        check_layer(model, layer)
    check_finite(model)


def check_moments(model: TransformerBridge, moments: Mapping[int, SecondMoment], layers: Sequence[int]) -> None:
    """Raises a ValueError where a layer has no second moment, or one that does not fit the model."""
    missing = [layer for layer in layers if layer not in moments]
    if missing:
        raise ValueError(f"second moments of the layers {sorted(moments)} were given; those of {missing} are missing")
    for layer in layers:
        moments[layer].check_fits(model, layer)


def spread(
    model: TransformerBridge,
    texts: Sequence[RequestTexts],
    values: Sequence[OptimisedValue],
    layers: Sequence[int],
    directions: Directions,
) -> dict[int, LowRankUpdate]:
    """Updates that write optimised values into all layers, each taking its share of what is left."""
    last = layers[-1]
    wordings = [(r, rows) for r, request in enumerate(texts) for rows in _by_wording(request)]
    alone = [rows[0] for _, rows in wordings]
    every = [text for _, rows in wordings for text in rows]
    lengths = [len(rows) for _, rows in wordings]
    delta = torch.stack([values[r].delta for r, _ in wordings])
    point = stream_point(last, "resid")
    target = at_subjects(model, [point], alone, last + 1)[0].to(delta) + delta
    updates: dict[int, LowRankUpdate] = {}
    for i, layer in enumerate(layers):
        hooks = [hook for done, update in updates.items() for hook in updating(done, update.keys, update.values)]
        with attached(model, hooks):
            now = at_subjects(model, [point], alone, last + 1)[0].to(delta)
            keys = at_subjects(model, [key_point(layer)], every, layer + 1)[0]
        parts = torch.split(keys.double(), lengths)
        mean = torch.stack([own.mean(0) for own in parts], dim=1)
        share = (target - now) / (len(layers) - i)
        found, served = (columns.T.to(delta).cpu().contiguous() for columns in (directions(layer, mean), mean))
        updates[layer] = LowRankUpdate(found, share.cpu(), served)
    return updates


def _by_wording(request: RequestTexts) -> list[list[RewritingText]]:
    """The texts of each wording, the context-free one first."""
    found: list[list[RewritingText]] = [[] for _ in request.request.wordings]
    for text in request.rewriting:
        found[text.wording].append(text)
    return found
