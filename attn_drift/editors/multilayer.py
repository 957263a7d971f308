"""Editors of several layers: their settings, and how they make edits. What they make of keys is in a file each."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal, TypeVar

import torch
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.checks import check_choice, check_fields, check_kind, check_wholes, describe
from attn_drift.editors.base import (
    Lengths,
    check_batches,
    check_lengths,
    finished,
    texts_of,
    warn_of_explosion,
    with_results,
)
from attn_drift.editors.spread import Directions, Site, Spread
from attn_drift.edits.edit import Edit
from attn_drift.edits.history import EditHistory
from attn_drift.edits.low_rank import LowRankUpdate, identities
from attn_drift.inference.memory import Budget
from attn_drift.model.changes import exclusive
from attn_drift.model.hooks import resid_post_point
from attn_drift.model.loading import check_finite, check_layer, check_model, fingerprint, float64_device
from attn_drift.moments.second_moment import SecondMoment, sampled_moments
from attn_drift.presets import load_preset, warn_once
from attn_drift.requests import EditRequest
from attn_drift.restrictions.base import Restriction, bind_restriction
from attn_drift.values.optimize import groups, optimize_values
from attn_drift.values.optimizer import ValueConfig, Writing

Config = TypeVar("Config", bound="MultiLayerConfig")

# Of MEMIT's context templates: five of ten tokens, one for each first word.
MEMIT_LENGTHS: Lengths = ((10, 1),)

# Share of the network's depth at which the published presets of editors of several layers end, on average, and of how
# many layers they edit: five, and fewer of a shallow network.
DEPTH, MOST_LAYERS, LAYERS_SHARE = 0.27, 5, 1 / 6


@dataclass(frozen=True, kw_only=True)
class MultiLayerConfig(ValueConfig, ABC):
    """How a value is optimized, and which layers it is written into.

    Attributes:
        layers: the edited layers, in ascending order.
        context_lengths: of the contexts that are sampled when none are handed in, see `sample_contexts`.
        restricted: what a restriction looks at while a value is optimized: the optimized vector at the last edited
            layer, above which it holds (``"value"``, as published), or the update as it would be written into all
            layers, above the first of them (``"update"``).
    """

    editor: ClassVar[str]

    layers: tuple[int, ...]
    clamp: float = 0.75
    context_lengths: Lengths = MEMIT_LENGTHS
    restricted: Literal["value", "update"] = "value"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, check_wholes, "layers")
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"the layers are {self.layers}; expected at least one, ascending, each once")
        check_fields(self, check_choice, "restricted", choices=["value", "update"])
        check_fields(self, check_lengths, "context_lengths")

    @classmethod
    def for_model(cls: type[Config], model: TransformerBridge, **given: Any) -> Config:
        """The settings given, the rest from the preset of the model's name, or the editor's usual where there is none.

        Where neither says which layers, they are chosen by depth, which the log says once for each model and editor.
        """
        settings = {**(load_preset(cls.editor, model) or {}), **given}
        if "layers" in settings:
            return cls(**settings)
        n = model.cfg.n_layers
        last = max(0, min(round(DEPTH * n), n - 2))
        first = max(0, last + 1 - min(MOST_LAYERS, max(2, round(LAYERS_SHARE * n))))
        warn_once(
            model,
            "%s has no preset for %s: layers %d to %d of %d were chosen by depth, the rest is the editor's usual; pass "
            "config=, and see `attn-drift suggest-layer`",
            model.cfg.model_name,
            cls.editor,
            first,
            last,
            n,
        )
        return cls(**settings, layers=tuple(range(first, last + 1)))

    @property
    def restricted_above(self) -> int:
        """The layer above which a restriction holds."""
        return self.layers[-1] if self.restricted == "value" else self.layers[0]

    @property
    def points(self) -> list[str]:
        """Where vectors are optimized; the first is written."""
        return [self.site.point]

    @property
    def site(self) -> Site:
        """Where values are read: by default the residual stream after the last edited layer."""
        return Site(resid_post_point(self.layers[-1]), float, carries=True)

    def check_earlier(self, earlier: Edit) -> None:
        """Raises a ValueError for an earlier edit that does not tell what the editor needs of it: here nothing."""

    @abstractmethod
    def directions(self, moments: Mapping[int, SecondMoment], device: torch.device, earlier: Edit | None) -> Directions:
        """What the editor makes of keys; raises a ValueError for moments or an earlier edit that do not serve it."""


@exclusive
@torch.inference_mode(False)
def edit_batches(
    model: TransformerBridge,
    batches: Sequence[EditRequest | Sequence[EditRequest]],
    config: MultiLayerConfig,
    *,
    contexts: Sequence[str] | None = None,
    moments: Mapping[int, SecondMoment] | None = None,
    restrict: Restriction | None = None,
    after: Edit | None = None,
    generator: torch.Generator | None = None,
) -> list[Edit]:
    """One edit for each batch of requests; all values are optimized together, each batch is written on its own.

    Arguments and errors are those of `memit`; ``after`` is an earlier edit that is in effect meanwhile.
    """
    requests = check_batches(batches)
    check_kind(config, MultiLayerConfig, "config", "settings of an editor of several layers")
    check_model(model)
    for layer in config.layers:
        check_layer(model, layer)
    term = bind_restriction(restrict, model, config.restricted_above)
    check_finite(model)
    if after is not None:
        _check_after(model, config, after)
    if moments is not None:
        directions = _directions(model, config, moments, after)
    flat = texts_of(model, [r for batch in requests for r in batch], contexts, config.context_lengths, generator)
    if moments is None:
        moments = sampled_moments(model, config.layers)
        directions = _directions(model, config, moments, after)
    remaining = iter(flat)
    grouped = [list(islice(remaining, len(batch))) for batch in requests]
    updates: list[dict[int, LowRankUpdate]] = []
    histories: list[EditHistory] = []
    # Where a restriction looks at the updates of a batch, all its values are optimized at once.
    budget = Budget.of(model, restrict is not None)
    chunks = [grouped] if config.restricted == "value" else groups(budget, grouped, whole=True)
    with nullcontext() if after is None else after.applied(model):
        for chunk in chunks:
            spread = Spread(model, chunk, config.layers, directions, config.site)
            texts = [request for batch in chunk for request in batch]
            values = optimize_values(model, config.points, texts, config, term, _writing(spread, config))
            found = spread.of(torch.stack([value.deltas for value in values]))
            updates += spread.by_batch(found)
            histories += with_results(model, texts, values, term, spread.by_request(found))
    edits = finished(model, config.editor, config, restrict, requests, updates, histories)
    for edit in edits:
        warn_of_explosion(model, edit, moments)
    return edits


def _writing(spread: Spread, config: MultiLayerConfig) -> Writing | None:
    """What a restriction looks at instead of the optimized vector, if that is asked."""
    return None if config.restricted == "value" else lambda deltas: spread.by_request(spread.of(deltas))


def _check_after(model: TransformerBridge, config: MultiLayerConfig, after: Edit) -> None:
    """Raises a ValueError for an earlier edit that cannot be in effect, or does not tell what the editor needs."""
    check_kind(after, Edit, "after", "an Edit")
    after.check_fits(model)
    after.check_not_in_effect(model)
    if after.fingerprint not in identities(model):
        raise ValueError(
            f"{after!r} was made for other weights ({after.fingerprint[:8]}) than those of {model.cfg.model_name} "
            f"({fingerprint(model)[:8]}), so that the two could not be added"
        )
    config.check_earlier(after)


def _directions(
    model: TransformerBridge, config: MultiLayerConfig, moments: Mapping[int, SecondMoment], after: Edit | None
) -> Directions:
    """The editor's, from moments that fit the model.

    Raises:
        ValueError: a layer has no second moment, or one that does not fit the model or the editor.
    """
    if not isinstance(moments, Mapping):
        raise ValueError(f"moments is {describe(moments)}; expected one for each layer: {{layer: moment}}")
    missing = [layer for layer in config.layers if layer not in moments]
    if missing:
        raise ValueError(f"second moments of the layers {list(moments)} were given; those of {missing} are missing")
    for layer in config.layers:
        check_kind(moments[layer], SecondMoment, f"the moment of layer {layer}", "a SecondMoment")
        moments[layer].check_fits(model, layer)
    return config.directions({layer: moments[layer] for layer in config.layers}, float64_device(model), after)
