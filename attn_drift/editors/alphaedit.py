"""AlphaEdit: updates that no key of the text sees (Fang et al., 2410.02355; method.md, section 4).

    Delta_l = R_l K_l^T P_l (K_p K_p^T P_l + K_l K_l^T P_l + L2 I)^-1

P projects on the null space of the second moment C (eigenvalues under a threshold), K_p are the keys of earlier edits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.checks import check_fields, check_number
from attn_drift.editors.base import check_config, listed
from attn_drift.editors.multilayer import MultiLayerConfig, edit_batches
from attn_drift.editors.spread import Directions
from attn_drift.edits.edit import Edit
from attn_drift.model.loading import check_model
from attn_drift.moments.second_moment import SecondMoment
from attn_drift.requests import EditRequest
from attn_drift.restrictions.base import Restriction


@dataclass(frozen=True, kw_only=True)
class AlphaEditConfig(MultiLayerConfig):
    """AlphaEdit's settings; `for_model` gives the published ones.

    Attributes:
        nullspace_threshold: eigenvalues of the second moment below it span the null space.
        l2: weight of the ridge in the solve.
    """

    editor: ClassVar[str] = "alphaedit"

    nullspace_threshold: float = 0.02
    l2: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, check_number, "nullspace_threshold", "l2", above=0)

    def check_earlier(self, earlier: Edit) -> None:
        """Raises a ValueError for an earlier edit that did not record its keys."""
        _earlier_keys(earlier, self.layers)

    def directions(self, moments: Mapping[int, SecondMoment], device: torch.device, earlier: Edit | None) -> Directions:
        spared = _earlier_keys(earlier, self.layers)
        spaces = {layer: moment.null_space(self.nullspace_threshold, device) for layer, moment in moments.items()}
        return lambda layer, keys: nullspace_direction(keys, spared.get(layer), spaces[layer], self.l2)


def alphaedit(
    model: TransformerBridge,
    requests: EditRequest | Sequence[EditRequest],
    *,
    config: AlphaEditConfig | None = None,
    contexts: Sequence[str] | None = None,
    moments: Mapping[int, SecondMoment] | None = None,
    restrict: Restriction | None = None,
    after: Edit | None = None,
    generator: torch.Generator | None = None,
) -> Edit:
    """Makes one edit of all requests; the model is left untouched.

    Args:
        model: the model.
        requests: one, or several, which are written together.
        config: settings; `AlphaEditConfig.for_model(model)` when None.
        contexts: templates that end in ``{}``, where the prompt goes; the empty one, ``"{}"``, is always first.
            `sample_contexts` when None.
        moments: per edited layer the second moment of its keys; `sampled_moments` when None.
        restrict: a loss term that restricts what the edit may do above the last edited layer (or above the first, see
            `MultiLayerConfig.restricted`), such as `SADR`.
        after: an earlier edit that recorded its keys, such as one of this editor, or a sum of several: it is in effect
            while this one is made, and its keys are spared. The two may be added.
        generator: of the contexts that are sampled here; seed 0 when None.

    Raises:
        ValueError: a bad request, context, layer, moment or setting, a text longer than the model's context, a weight
            that is not finite, no null space, or an earlier edit that did not record its keys; before the model runs.
    """
    check_model(model)
    config = AlphaEditConfig.for_model(model) if config is None else config
    check_config(config, AlphaEditConfig)
    (edit,) = edit_batches(
        model,
        [listed(requests)],
        config,
        contexts=contexts,
        moments=moments,
        restrict=restrict,
        after=after,
        generator=generator,
    )
    return edit


def _earlier_keys(earlier: Edit | None, layers: Sequence[int]) -> dict[int, Float64[Tensor, "d_mlp n"]]:
    """The keys of an earlier edit, by layer."""
    if earlier is None:
        return {}
    found = {}
    for layer in sorted(set(layers) & set(earlier.updates)):
        keys = earlier.updates[layer].target_keys
        if keys is None:
            raise ValueError(f"{earlier!r} did not record its keys; give edits such as alphaedit's own")
        found[layer] = keys.T.double()
    return found


def nullspace_direction(
    keys: Float64[Tensor, "d_mlp n"],
    earlier: Float64[Tensor, "d_mlp m"] | None,
    space: Float64[Tensor, "d_mlp null"],
    l2: float,
) -> Float64[Tensor, "d_mlp n"]:
    """``(P (K_p K_p^T + K K^T) + L2 I)^-1 P K``: of ``P A (A^T P A + L2 I)^-1``, ``A = [K_p K]``, the last columns."""
    both = keys if earlier is None else torch.cat([earlier.to(keys), keys], dim=1)
    projected = space @ (space.T @ both)
    small = both.T @ projected + l2 * torch.eye(both.shape[1], dtype=both.dtype, device=both.device)
    solved: Float64[Tensor, "d_mlp n"] = torch.linalg.solve(small.T, projected.T).T[:, -keys.shape[1] :]
    return solved
