"""MEMIT: many facts at once, spread over several layers (Meng et al., 2210.07229; method.md, section 4).

Delta_l = R_l K_l^T (lambda C_l + K_l K_l^T)^-1
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf

import torch
from jaxtyping import Float64
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.editors.shared import listed, texts_of
from attn_drift.editors.spread import SpreadConfig, check_layers, check_moments, spread
from attn_drift.edits import Edit
from attn_drift.hooks import stream_point
from attn_drift.models import fingerprint, float64_device
from attn_drift.moments import FactoredMoment, SecondMoment, sampled_moment
from attn_drift.requests import EditRequest
from attn_drift.restriction import Restriction
from attn_drift.values import optimise_values


@dataclass(frozen=True, kw_only=True)
class MEMITConfig(SpreadConfig):
    """MEMIT's settings.

    Attributes:
        moment_weight: ``lambda``, of the second moment in the solve: how many keys it counts as.
        ridge: added to each second moment's diagonal, in units of its mean.
    """

    moment_weight: float = 15_000.0
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.moment_weight < inf and 0 <= self.ridge < inf):
            raise ValueError(
                f"moment_weight is {self.moment_weight} and ridge {self.ridge}; expected the first to be positive, the "
                "second not negative"
            )


def memit(
    model: TransformerBridge,
    requests: EditRequest | Sequence[EditRequest],
    *,
    config: MEMITConfig,
    contexts: Sequence[str] | None = None,
    moments: Mapping[int, SecondMoment] | None = None,
    restrict: Restriction | None = None,
    generator: torch.Generator | None = None,
) -> Edit:
    """Makes one edit of all requests; the model is left untouched.

    Args:
        model: the model.
        requests: one, or several, which are written together.
        config: settings.
        contexts: templates that end in ``{}``, where the prompt goes; the empty one, ``"{}"``, is always first.
            `sample_contexts` when None.
        moments: per edited layer the second moment of its keys; `sampled_moment` when None.
        restrict: a loss term that restricts what the edit may do above the last edited layer, such as `SADR`.
        generator: of the contexts that are sampled here; seed 0 when None.

    Raises:
        ValueError: a bad request, context, layer, moment or setting, a text longer than the model's context, or a
            weight that is not finite; before the model runs.
    """
    several, last = listed(requests), config.layers[-1]
    check_layers(model, config.layers)
    term = None if restrict is None else restrict.bind(model, last)
    factored = {} if moments is None else _factored(model, moments, config)
    texts = texts_of(model, several, contexts, config.context_lengths, generator)
    if moments is None:
        factored = _factored(model, {layer: sampled_moment(model, layer) for layer in config.layers}, config)
    values = optimise_values(model, stream_point(last, "resid"), texts, config, term)
    updates = spread(
        model,
        texts,
        values,
        config.layers,
        lambda layer, keys: batch_direction(keys, factored[layer], config.moment_weight),
    )
    method = {"editor": "memit", "config": asdict(config), "restrict": None if restrict is None else repr(restrict)}
    return Edit(
        updates, tuple(several), fingerprint(model), model.cfg.model_name, method, tuple(v.history for v in values)
    )


def _factored(
    model: TransformerBridge, moments: Mapping[int, SecondMoment], config: MEMITConfig
) -> dict[int, FactoredMoment]:
    check_moments(model, moments, config.layers)
    device = float64_device(model)
    return {layer: moments[layer].factored(config.ridge, device) for layer in config.layers}


def batch_direction(
    keys: Float64[Tensor, "d_mlp n"], moment: FactoredMoment, weight: float
) -> Float64[Tensor, "d_mlp n"]:
    """``(weight * C + K K^T)^-1 K``, which is ``X (I + K^T X)^-1`` with ``X = C^-1 K / weight``: a small system."""
    solved = moment.solve(keys) / weight
    small = torch.eye(keys.shape[1], dtype=solved.dtype, device=solved.device) + keys.T @ solved
    result: Float64[Tensor, "d_mlp n"] = torch.linalg.solve(small.T, solved.T).T
    return result
