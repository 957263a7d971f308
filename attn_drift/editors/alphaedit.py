"""AlphaEdit: updates that no key of the text sees (Fang et al., 2410.02355; method.md, section 4).

    Delta_l = R_l K_l^T P_l (K_p K_p^T P_l + K_l K_l^T P_l + L2 I)^-1

P projects on the null space of the second moment C (eigenvalues under a threshold), K_p are the keys of earlier edits.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
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
from attn_drift.moments import SecondMoment, sampled_moment
from attn_drift.requests import EditRequest
from attn_drift.restriction import Restriction
from attn_drift.values import optimise_values


@dataclass(frozen=True, kw_only=True)
class AlphaEditConfig(SpreadConfig):
    """AlphaEdit's settings.

    Attributes:
        nullspace_threshold: eigenvalues of the second moment below it span the null space.
        l2: weight of the ridge in the solve.
    """

    nullspace_threshold: float = 0.02
    l2: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.nullspace_threshold < inf and 0 < self.l2 < inf):
            raise ValueError(
                f"nullspace_threshold is {self.nullspace_threshold} and l2 {self.l2}; expected both to be positive"
            )


def alphaedit(
    model: TransformerBridge,
    requests: EditRequest | Sequence[EditRequest],
    *,
    config: AlphaEditConfig,
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
        config: settings.
        contexts: templates that end in ``{}``, where the prompt goes; the empty one, ``"{}"``, is always first.
            `sample_contexts` when None.
        moments: per edited layer the second moment of its keys; `sampled_moment` when None.
        restrict: a loss term that restricts what the edit may do above the last edited layer, such as `SADR`.
        after: an earlier edit of this editor, or a sum of several: it is in effect while this one is made, and its
            keys are spared. The two may be added.
        generator: of the contexts that are sampled here; seed 0 when None.

    Raises:
        ValueError: a bad request, context, layer, moment or setting, a text longer than the model's context, a weight
            that is not finite, no null space, or an earlier edit that does not tell its keys; before the model runs.
    """
    several, last = listed(requests), config.layers[-1]
    check_layers(model, config.layers)
    term = None if restrict is None else restrict.bind(model, last)
    earlier = _earlier(after, config.layers)
    spaces = {} if moments is None else _null_spaces(model, moments, config)
    texts = texts_of(model, several, contexts, config.context_lengths, generator)
    if moments is None:
        spaces = _null_spaces(model, {layer: sampled_moment(model, layer) for layer in config.layers}, config)

    def directions(layer: int, keys: Float64[Tensor, "d_mlp n"]) -> Float64[Tensor, "d_mlp n"]:
        return nullspace_direction(keys.to(spaces[layer]), earlier.get(layer), spaces[layer], config.l2)

    with nullcontext() if after is None else after.applied(model):
        values = optimise_values(model, stream_point(last, "resid"), texts, config, term)
        updates = spread(model, texts, values, config.layers, directions)
    method = {"editor": "alphaedit", "config": asdict(config), "restrict": None if restrict is None else repr(restrict)}
    return Edit(
        updates, tuple(several), fingerprint(model), model.cfg.model_name, method, tuple(v.history for v in values)
    )


def _earlier(after: Edit | None, layers: Sequence[int]) -> dict[int, Float64[Tensor, "d_mlp n"]]:
    """The keys of earlier edits, by layer."""
    if after is None:
        return {}
    found = {}
    for layer in sorted(set(layers) & set(after.updates)):
        served = after.updates[layer].served
        if served is None:
            raise ValueError(f"{after!r} does not tell which keys it serves; give edits that alphaedit made")
        found[layer] = served.T.double()
    return found


def _null_spaces(
    model: TransformerBridge, moments: Mapping[int, SecondMoment], config: AlphaEditConfig
) -> dict[int, Float64[Tensor, "d_mlp null"]]:
    check_moments(model, moments, config.layers)
    device = float64_device(model)
    return {layer: moments[layer].null_space(config.nullspace_threshold, device) for layer in config.layers}


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
