"""MEMIT: many facts at once, spread over several layers (Meng et al., 2210.07229; method.md, section 4).

    R_l = (Z - Z_now) / (layers left),   Delta_l = R_l K_l^T (lambda C_l + K_l K_l^T)^-1      for each layer l in order

Z is the residual stream after the last edited layer at the subject-last token, plus the optimised delta; keys and Z_now
are read anew after each layer. A request of several wordings has a column for each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf

import torch
from jaxtyping import Float64
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.editors.shared import Lengths, at_subjects, listed, texts_of
from attn_drift.edits import Edit
from attn_drift.hooks import attached, key_point, stream_point, updating
from attn_drift.models import check_finite, check_layer, check_model, fingerprint, float64_device
from attn_drift.moments import FactoredMoment, SecondMoment, sampled_moment
from attn_drift.requests import EditRequest
from attn_drift.restriction import Restriction
from attn_drift.rewriting import RequestTexts, RewritingText
from attn_drift.values import OptimisedValue, ValueConfig, optimise_values
from attn_drift.weights import LowRankUpdate

# Of MEMIT's context templates: five of ten tokens, one for each first word.
MEMIT_LENGTHS: Lengths = ((10, 1),)


@dataclass(frozen=True, kw_only=True)
class MEMITConfig(ValueConfig):
    """MEMIT's settings.

    Attributes:
        layers: the edited layers, in ascending order.
        moment_weight: ``lambda``, of the second moment in the solve: how many keys it counts as.
        ridge: added to each second moment's diagonal, in units of its mean.
        context_lengths: of the contexts that are sampled when none are handed in, see `sample_contexts`.
    """

    layers: tuple[int, ...]
    clamp: float = 0.75
    moment_weight: float = 15_000.0
    ridge: float = 1e-4
    context_lengths: Lengths = MEMIT_LENGTHS

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"the layers are {self.layers}; expected at least one, ascending, each once")
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
    check_model(model)
    for layer in config.layers:
        check_layer(model, layer)
    check_finite(model)
    term = None if restrict is None else restrict.bind(model, last)
    factored = {} if moments is None else _factored(model, moments, config)
    texts = texts_of(model, several, contexts, config.context_lengths, generator)
    if moments is None:
        factored = _factored(model, {layer: sampled_moment(model, layer) for layer in config.layers}, config)
    values = optimise_values(model, stream_point(last, "resid"), texts, config, term)
    updates = spread(model, texts, values, config, factored)
    method = {"editor": "memit", "config": asdict(config), "restrict": None if restrict is None else repr(restrict)}
    history = values[0].history if len(values) == 1 else None
    return Edit(updates, tuple(several), fingerprint(model), model.cfg.model_name, method, history)


def _factored(
    model: TransformerBridge, moments: Mapping[int, SecondMoment], config: MEMITConfig
) -> dict[int, FactoredMoment]:
    missing = [layer for layer in config.layers if layer not in moments]
    if missing:
        raise ValueError(f"second moments of the layers {sorted(moments)} were given; those of {missing} are missing")
    for layer in config.layers:
        moments[layer].check_fits(model, layer)
    device = float64_device(model)
    return {layer: moments[layer].factored(config.ridge, device) for layer in config.layers}


def spread(
    model: TransformerBridge,
    texts: Sequence[RequestTexts],
    values: Sequence[OptimisedValue],
    config: MEMITConfig,
    moments: Mapping[int, FactoredMoment],
) -> dict[int, LowRankUpdate]:
    """Writes the optimised values into all layers, each taking its share of what is left."""
    last = config.layers[-1]
    wordings = [(r, wording) for r, request in enumerate(texts) for wording in _by_wording(request)]
    alone = [rows[0] for _, rows in wordings]
    every = [text for _, rows in wordings for text in rows]
    lengths = [len(rows) for _, rows in wordings]
    delta = torch.stack([values[r].delta for r, _ in wordings])
    point = stream_point(last, "resid")
    target = at_subjects(model, [point], alone, last + 1)[0].to(delta) + delta
    updates: dict[int, LowRankUpdate] = {}
    for i, layer in enumerate(config.layers):
        hooks = [hook for done, update in updates.items() for hook in updating(done, update.keys, update.values)]
        with attached(model, hooks):
            now = at_subjects(model, [point], alone, last + 1)[0].to(delta)
            keys = at_subjects(model, [key_point(layer)], every, layer + 1)[0]
        parts = torch.split(keys.to(moments[layer].factor), lengths)
        mean = torch.stack([own.mean(0) for own in parts], dim=1)
        share = (target - now) / (len(config.layers) - i)
        solved = batch_direction(mean, moments[layer], config.moment_weight)
        updates[layer] = LowRankUpdate(solved.T.to(delta).cpu().contiguous(), share.cpu())
    return updates


def _by_wording(request: RequestTexts) -> list[list[RewritingText]]:
    """The texts of each wording, the context-free one first."""
    found: list[list[RewritingText]] = [[] for _ in request.request.wordings]
    for text in request.rewriting:
        found[text.wording].append(text)
    return found


def batch_direction(
    keys: Float64[Tensor, "d_mlp n"], moment: FactoredMoment, weight: float
) -> Float64[Tensor, "d_mlp n"]:
    """``(weight * C + K K^T)^-1 K``, which is ``X (I + K^T X)^-1`` with ``X = C^-1 K / weight``: a small system."""
    solved = moment.solve(keys) / weight
    small = torch.eye(keys.shape[1], dtype=solved.dtype, device=solved.device) + keys.T @ solved
    result: Float64[Tensor, "d_mlp n"] = torch.linalg.solve(small.T, solved.T).T
    return result
