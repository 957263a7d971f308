"""SADR, selective attention drift restriction: a loss term that holds drifting heads to their vanilla attention.

    threshold[l,b]  = max_h' A[l,h',t_b,s_b]
    selected[l,h,b] = A*[l,h,t_b,s_b] > threshold[l,b]
    L_SADR = (1/B) sum_l sum_b sum_h selected[l,h,b] * KL(A[l,h,t_b,:] || A*[l,h,t_b,:])

(method.md, section 3; Wang et al., ICLR 2025, section 4). The value optimiser takes any `Restriction`; it knows
nothing of attention, and nothing here knows an editor.
"""

import re
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from einops import einsum, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.checks import (
    check_choice,
    check_fields,
    check_list,
    check_number,
    check_pair,
    check_whole,
    check_wholes,
    describe,
)
from attn_drift.hooks import pattern_point
from attn_drift.models import check_layer
from attn_drift.rewriting import RewritingBatch

FLOOR = 1e-8

HEAD_LABEL = re.compile(r"L(\d{1,6})H(\d{1,6})", re.ASCII)

Rows = Float[Tensor, "layer text head query key"]
Distributions = Float[Tensor, "*batch key"]
Subject = Float[Tensor, "layer text head query"]
Selected = Bool[Tensor, "layer text head query"]


@dataclass(frozen=True, eq=False)
class Penalty:
    """What a restriction costs.

    Attributes:
        loss: its weighted term of each rewriting text's loss.
        selected: share of query rows on which each head of each layer of the model was held; None where a
            restriction is not one of heads.
    """

    loss: Float[Tensor, " text"]
    selected: Float[Tensor, "text layer head"] | None = None


@runtime_checkable
class LossTerm(Protocol):
    """A restriction bound to a model and an edit's layer."""

    @property
    def points(self) -> list[str]:
        """The hook points that it reads."""
        ...

    def observe(self, activations: dict[str, Tensor], batch: RewritingBatch) -> Any:
        """What it keeps of them: asked once of the vanilla model, and at every step, gradients kept.

        The axis of positions (of patterns: that of queries) begins at ``batch.offset``.
        """
        ...

    def penalty(self, vanilla: Any, edited: Any, batch: RewritingBatch) -> Penalty:
        """The term, from what `observe` returned for the vanilla and for the edited model."""
        ...


@runtime_checkable
class Restriction(Protocol):
    """A loss term on what an edit does to activations on its rewriting texts."""

    def bind(self, model: TransformerBridge, layer: int) -> LossTerm:
        """The term for an edit of ``layer``; raises a ValueError for settings that the model cannot meet."""
        ...


def bind_restriction(restrict: object, model: TransformerBridge, layer: int) -> LossTerm | None:
    """The term of a restriction for an edit of ``layer``; None where there is none.

    Raises:
        ValueError: anything but one restriction, or settings that the model cannot meet.
    """
    if restrict is None:
        return None
    # The class of a restriction has all of its methods, but no settings.
    if isinstance(restrict, type) or not isinstance(restrict, Restriction):
        one = "one, several at once are not supported" if isinstance(restrict, list | tuple | Set) else "a restriction"
        raise ValueError(f"restrict is {describe(restrict)}; expected {one}: SADR(gamma=0.01), for example")
    return restrict.bind(model, layer)


@runtime_checkable
class HeadRule(Protocol):
    """Which heads are held: attention to the subject-last token, vanilla and edited, to a selection."""

    def __call__(self, vanilla: Subject, edited: Subject, layers: Sequence[int]) -> Selected: ...


@dataclass(frozen=True)
class LayerMax:
    """The paper's rule: heads whose attention to the subject exceeds what any head of the layer gave it before."""

    def __call__(self, vanilla: Subject, edited: Subject, layers: Sequence[int]) -> Selected:
        return edited > vanilla.amax(2, keepdim=True)


@dataclass(frozen=True)
class AllHeads:
    """Every head of every layer: the paper's ablation."""

    def __call__(self, vanilla: Subject, edited: Subject, layers: Sequence[int]) -> Selected:
        return torch.ones_like(edited, dtype=torch.bool)


@dataclass(frozen=True)
class TopK:
    """Per text, the ``k`` heads of all restricted layers whose attention to the subject rose most, if it rose."""

    k: int

    def __post_init__(self) -> None:
        check_fields(self, check_whole, "k", at_least=1)

    def __call__(self, vanilla: Subject, edited: Subject, layers: Sequence[int]) -> Selected:
        drift = (edited - vanilla).permute(1, 3, 0, 2)
        flat = drift.flatten(2)
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen.scatter_(2, flat.topk(min(self.k, flat.shape[2]), dim=2).indices, True)
        return (chosen & (flat > 0)).view(drift.shape).permute(2, 0, 3, 1)


@dataclass(frozen=True)
class Margin:
    """Heads whose own attention to the subject rose by more than ``margin``."""

    margin: float

    def __post_init__(self) -> None:
        check_fields(self, check_number, "margin")

    def __call__(self, vanilla: Subject, edited: Subject, layers: Sequence[int]) -> Selected:
        return edited > vanilla + self.margin


def _parse_head(head: object) -> tuple[int, int]:
    """Layer and index of a head that is given as a label or as a pair."""
    if isinstance(head, str) and (label := HEAD_LABEL.fullmatch(head)):
        return int(label[1]), int(label[2])
    return check_pair(head, "a head", "a label such as 'L4H3', or a pair (layer, head)", at_least=0)


@dataclass(frozen=True)
class FixedHeads:
    """A fixed set of heads, given as labels such as ``"L4H3"`` or as pairs ``(layer, head)``.

    Attributes:
        heads: the pairs.

    Raises:
        ValueError: something in it is no head.
    """

    heads: frozenset[tuple[int, int]]

    def __init__(self, heads: str | Iterable[str | Sequence[int]]) -> None:
        given = [heads] if isinstance(heads, str) else check_list(heads, "heads", "a list of heads, such as ['L4H3']")
        object.__setattr__(self, "heads", frozenset(map(_parse_head, given)))

    def __call__(self, vanilla: Subject, edited: Subject, layers: Sequence[int]) -> Selected:
        selected = torch.zeros_like(edited, dtype=torch.bool)
        for layer, head in self.heads:
            if layer in layers:
                selected[layers.index(layer), :, head] = True
        return selected


def restricted_layers(model: TransformerBridge, layer: int, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    """The layers that a restriction holds in an edit of ``layer``: those given, or all above it when None.

    Raises:
        ValueError: there are none, one is named twice, is out of range or not above the edited one.
    """
    chosen = tuple(range(layer + 1, model.cfg.n_layers)) if layers is None else layers
    for index in chosen:
        check_layer(model, index)
    if len(set(chosen)) < len(chosen) or any(index <= layer for index in chosen):
        raise ValueError(
            f"the restricted layers are {chosen}; expected layers above layer {layer}, each once: what a restriction "
            "sees of an edit changes no attention up to there (of an edit of several layers it sees the vector at the "
            "last, or with restricted='update' all that is written)"
        )
    if not chosen:
        raise ValueError(
            f"no layer is left to restrict above the edited layer {layer} of {model.cfg.n_layers}; edit an earlier "
            "layer"
        )
    return chosen


def _kl(p: Distributions, q: Distributions) -> Tensor:
    return ((p + FLOOR) * ((p + FLOOR) / (q + FLOOR)).log()).sum(-1)


def _js(p: Distributions, q: Distributions) -> Tensor:
    middle = (p + q) / 2
    return (_kl(p, middle) + _kl(q, middle)) / 2


DIVERGENCES: dict[str, Callable[[Distributions, Distributions], Tensor]] = {
    "kl": _kl,
    "reverse_kl": lambda p, q: _kl(q, p),
    "js": _js,
    "l2": lambda p, q: (p - q).square().sum(-1),
}


@dataclass(frozen=True, kw_only=True)
class SADR:
    """Selective attention drift restriction.

    Attributes:
        gamma: its weight. Layers and heads are summed, so that its strength grows with their number; the published
            scales are 0.01 (ROME), 0.005 (MEMIT) and 0.08 (PMET), all on GPT-J.
        heads: which heads are held, decided anew at every step: `LayerMax` (the paper's), `AllHeads`, `TopK`,
            `Margin`, `FixedHeads`, or any function of that form.
        divergence: of vanilla rows ``A`` against edited rows ``A*``: ``"kl"`` is KL(A || A*), the paper's;
            ``"reverse_kl"``, ``"js"`` (Jensen-Shannon), ``"l2"`` (squared).
        layers: which layers; all above the edited one when None (those below cannot change).
        queries: whose rows are held: those of the ``"prompt_last"`` token, the paper's, or of all tokens
            ``"after_subject"`` up to it, averaged.
    """

    gamma: float
    heads: HeadRule = LayerMax()
    divergence: Literal["kl", "reverse_kl", "js", "l2"] = "kl"
    layers: tuple[int, ...] | None = None
    queries: Literal["prompt_last", "after_subject"] = "prompt_last"

    def __post_init__(self) -> None:
        check_fields(self, check_number, "gamma", at_least=0)
        check_fields(self, check_choice, "divergence", choices=list(DIVERGENCES))
        check_fields(self, check_choice, "queries", choices=["prompt_last", "after_subject"])
        # A class is callable, too, and would fail when it is called with patterns.
        if isinstance(self.heads, type) or not callable(self.heads):
            rules = "LayerMax() or FixedHeads(['L4H3'])"
            raise ValueError(f"heads is {describe(self.heads)}; expected a rule such as {rules}")
        if self.layers is not None:
            check_fields(self, check_wholes, "layers")

    def restricted_layers(self, model: TransformerBridge, layer: int) -> tuple[int, ...]:
        """The layers that are restricted for an edit of ``layer``.

        Raises:
            ValueError: there are none, one is named twice, is out of range or not above the edited one (so that
                nothing could drift in it), or a fixed head does not exist.
        """
        layers = restricted_layers(model, layer, self.layers)
        if isinstance(self.heads, FixedHeads):
            for chosen, head in self.heads.heads:
                if chosen not in layers or not 0 <= head < model.cfg.n_heads:
                    raise ValueError(
                        f"the head L{chosen}H{head} is not among the {model.cfg.n_heads} heads of the restricted "
                        f"layers {layers}"
                    )
        return layers

    def bind(self, model: TransformerBridge, layer: int) -> "BoundSADR":
        """The loss term for an edit of ``layer``."""
        return BoundSADR(self, self.restricted_layers(model, layer), model.cfg.n_layers)


@dataclass(frozen=True)
class BoundSADR:
    """SADR for one model and edited layer: a `LossTerm`."""

    settings: SADR
    layers: tuple[int, ...]
    n_layers: int

    @property
    def points(self) -> list[str]:
        """The patterns of the restricted layers."""
        return [pattern_point(layer) for layer in self.layers]

    def observe(self, activations: dict[str, Tensor], batch: RewritingBatch) -> Rows:
        """The restricted query rows of the rewriting texts, in float32 at least."""
        columns, _ = self._queries(batch)
        texts = torch.arange(batch.n_texts, device=columns.device)[:, None]
        # Advanced indices around a slice put their axes first: [text query head key].
        patterns = [activations[point].to(columns.device) for point in self.points]
        rows = [pattern[texts, :, columns - batch.offset].transpose(1, 2) for pattern in patterns]
        stacked = torch.stack(rows)
        return stacked.to(torch.promote_types(stacked.dtype, torch.float32))

    def penalty(self, vanilla: Rows, edited: Rows, batch: RewritingBatch) -> Penalty:
        """``gamma * L_SADR`` of each text."""
        _, weights = self._queries(batch)
        subject = batch.subject_last[: batch.n_texts].view(1, -1, 1, 1, 1)
        before = vanilla.gather(-1, subject.expand(*vanilla.shape[:-1], 1)).squeeze(-1)
        after = edited.detach().gather(-1, subject.expand(*edited.shape[:-1], 1)).squeeze(-1)
        selected = self.settings.heads(before, after, self.layers)
        held = einsum(selected.to(vanilla.dtype), weights.to(vanilla.dtype), "l b h q, b q -> l b h q")
        divergence = DIVERGENCES[self.settings.divergence](vanilla, edited)
        loss = self.settings.gamma * einsum(held, divergence, "l b h q, l b h q -> b")
        share = held.new_zeros(batch.n_texts, self.n_layers, held.shape[2])
        share[:, list(self.layers)] = reduce(held, "l b h q -> b l h", "sum")
        return Penalty(loss, share)

    def _queries(self, batch: RewritingBatch) -> tuple[Int[Tensor, "text query"], Float[Tensor, "text query"]]:
        """Columns of the restricted rows of each text, and their weights, which sum to one (0: filling)."""
        last = batch.prompt_last[:, None]
        if self.settings.queries == "prompt_last":
            return last, torch.ones_like(last, dtype=torch.float32)
        # A prompt that ends in its subject has no row after it but its own last.
        first = torch.minimum(batch.subject_last[: batch.n_texts, None] + 1, last)
        columns = first + torch.arange(int((last - first).max()) + 1, device=last.device)
        inside = (columns <= last).float()
        return torch.minimum(columns, last), inside / inside.sum(1, keepdim=True)
