"""MEMIT: many facts at once, spread over several layers (Meng et al., 2210.07229; method.md, section 4).

Delta_l = R_l K_l^T (lambda C_l + K_l K_l^T)^-1
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
from attn_drift.moments.second_moment import FactoredMoment, SecondMoment
from attn_drift.requests import EditRequest
from attn_drift.restrictions.base import Restriction


@dataclass(frozen=True, kw_only=True)
class MEMITConfig(MultiLayerConfig):
    """MEMIT's settings; `for_model` gives the published ones.

    Attributes:
        moment_weight: ``lambda``, of the second moment in the solve: how many keys it counts as.
        ridge: added to each second moment's diagonal, in units of its mean. 0 in the published presets; needed where
            the moment comes from little text.
    """

    editor: ClassVar[str] = "memit"

    moment_weight: float = 15_000.0
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, check_number, "moment_weight", above=0)
        check_fields(self, check_number, "ridge", at_least=0)

    def directions(self, moments: Mapping[int, SecondMoment], device: torch.device, earlier: Edit | None) -> Directions:
        factored = {layer: moment.factored(self.ridge, device) for layer, moment in moments.items()}
        return lambda layer, keys: batch_direction(keys, factored[layer], self.moment_weight)


def memit(
    model: TransformerBridge,
    requests: EditRequest | Sequence[EditRequest],
    *,
    config: MEMITConfig | None = None,
    contexts: Sequence[str] | None = None,
    moments: Mapping[int, SecondMoment] | None = None,
    restrict: Restriction | None = None,
    generator: torch.Generator | None = None,
) -> Edit:
    """Makes one edit of all requests; the model is left untouched.

    Args:
        model: the model.
        requests: one, or several, which are written together.
        config: settings; `MEMITConfig.for_model(model)` when None.
        contexts: templates that end in ``{}``, where the prompt goes; the empty one, ``"{}"``, is always first.
            `sample_contexts` when None.
        moments: per edited layer the second moment of its keys; `sampled_moments` when None.
        restrict: a loss term that restricts what the edit may do above the last edited layer (or above the first, see
            `MultiLayerConfig.restricted`), such as `SADR`.
        generator: of the contexts that are sampled here; seed 0 when None.

    Raises:
        ValueError: a bad request, context, layer, moment or setting, a text longer than the model's context, or a
            weight that is not finite; before the model runs.
    """
    check_model(model)
    config = MEMITConfig.for_model(model) if config is None else config
    check_config(config, MEMITConfig)
    (edit,) = edit_batches(
        model,
        [listed(requests)],
        config,
        contexts=contexts,
        moments=moments,
        restrict=restrict,
        generator=generator,
    )
    return edit


def batch_direction(
    keys: Float64[Tensor, "d_mlp n"], moment: FactoredMoment, weight: float
) -> Float64[Tensor, "d_mlp n"]:
    """``(weight * C + K K^T)^-1 K``, which is ``X (I + K^T X)^-1`` with ``X = C^-1 K / weight``: a small system."""
    solved = moment.solve(keys) / weight
    small = torch.eye(keys.shape[1], dtype=solved.dtype, device=solved.device) + keys.T @ solved
    result: Float64[Tensor, "d_mlp n"] = torch.linalg.solve(small.T, solved.T).T
    return result
