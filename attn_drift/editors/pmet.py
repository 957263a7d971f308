"""PMET: the value of the MLP alone, optimized beside one of attention (Li et al., 2308.08742; method.md, section 4).

    R_l = (Z - Z_now) / sqrt(layers left),   Delta_l = R_l K_l^T (lambda C_l + K_l K_l^T)^-1

Two vectors are optimized, at the outputs of the MLP and of attention of the last edited layer. What attention could do
is left to the second, so that the first, Z's, is the MLP's own; only the first is written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.editors.base import check_config, listed
from attn_drift.editors.memit import MEMITConfig
from attn_drift.editors.multilayer import edit_batches
from attn_drift.editors.spread import Site
from attn_drift.edits.edit import Edit
from attn_drift.model.hooks import attn_out_point, value_point
from attn_drift.model.loading import check_model
from attn_drift.moments.second_moment import SecondMoment
from attn_drift.requests import EditRequest
from attn_drift.restrictions.base import Restriction
from attn_drift.values.optimizer import Settled

# A tenth of the NLL once the target is the first choice, and done when the essence term is at most 0.01.
SETTLED = Settled()


@dataclass(frozen=True, kw_only=True)
class PMETConfig(MEMITConfig):
    """PMET's settings; `for_model` gives the published ones. The solve is MEMIT's."""

    editor: ClassVar[str] = "pmet"

    steps: int = 30
    learning_rate: float = 0.2
    kl_factor: float = 1.0
    settled: Settled | None = SETTLED

    @property
    def points(self) -> list[str]:
        """The outputs of MLP and attention in the last edited layer."""
        return [self.site.point, attn_out_point(self.layers[-1])]

    @property
    def site(self) -> Site:
        """The output of the MLP, where nothing of an earlier layer's update arrives as it is."""
        return Site(value_point(self.layers[-1]), sqrt, carries=False)


def pmet(
    model: TransformerBridge,
    requests: EditRequest | Sequence[EditRequest],
    *,
    config: PMETConfig | None = None,
    contexts: Sequence[str] | None = None,
    moments: Mapping[int, SecondMoment] | None = None,
    restrict: Restriction | None = None,
    generator: torch.Generator | None = None,
) -> Edit:
    """Makes one edit of all requests; the model is left untouched.

    Args:
        model: the model.
        requests: one, or several, which are written together.
        config: settings; `PMETConfig.for_model(model)` when None.
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
    config = PMETConfig.for_model(model) if config is None else config
    check_config(config, PMETConfig)
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
