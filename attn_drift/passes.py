"""Runs of rewriting texts while values are optimised: what is read, what is added, what a restriction sees."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.hooks import (
    adding,
    attached,
    reading,
    run,
    updating,
)
from attn_drift.prefixes import Prefixes, Suffixes
from attn_drift.restriction import LossTerm, Penalty
from attn_drift.rewriting import IGNORED, RequestTexts, RewritingBatch, rewriting_batch
from attn_drift.shortcuts import Constants, Forward, fused, replaced

Deltas = Float[Tensor, "request site d_model"]


@dataclass(frozen=True, eq=False)
class SeenUpdate:
    """A low-rank update of one layer, and which of its ranks are in effect for each request."""

    keys: Float[Tensor, "rank d_mlp"]
    values: Float[Tensor, "rank d_model"]
    seen: Bool[Tensor, "request rank"]

    def of(self, requests: Int[Tensor, " own"]) -> "SeenUpdate":
        """As some of the requests see it, in any order and number; ranks that none of them sees are left out."""
        seen = self.seen[requests.to(self.seen.device)]
        ranks = seen.any(0)
        return SeenUpdate(self.keys[ranks], self.values[ranks], seen[:, ranks])


class Pass:
    """A batch of texts that is run together, and its share of the loss.

    What does not change from step to step is computed once: what stands before the batch's offset, the layers below the
    first vector that is optimised, and what its own layer does before it. Logits are made only where a loss reads them.
    """

    def __init__(
        self,
        model: TransformerBridge,
        points: Sequence[str],
        batch: RewritingBatch,
        restriction: LossTerm | None,
        deltas: Callable[[], Deltas],
    ) -> None:
        self.model, self.points, self.batch = model, points, batch
        # Essence texts have nothing to restrict.
        self.restriction = restriction if batch.n_texts else None
        self.dtype = deltas().dtype
        self.store: dict[str, Tensor] = {}
        read = [*points, *([] if self.restriction is None else self.restriction.points)]
        columns = batch.subject_last - batch.offset

        def vectors_of(site: int) -> Callable[[], Float[Tensor, "text d_model"]]:
            return lambda: deltas()[batch.owner, site]

        # Reading comes before adding, so that the stored values are the vanilla ones.
        self.reading = reading(read, self.store)
        self.adding = [adding(point, columns, vectors_of(site)) for site, point in enumerate(points)]
        self.columns = self._columns()
        names = [row.text for row in batch.tokens.rows]
        lengths = (batch.offset - batch.tokens.starts).tolist()
        if batch.offset:
            read_once = [row.ids[:n] for row, n in zip(batch.tokens.rows, lengths, strict=True)]
            self.prefixes = Prefixes.read(model, names, read_once)
        else:
            self.prefixes = Prefixes.none(model, names)
        self.suffixes = Suffixes(batch.tokens.ids[:, batch.offset :], batch.tokens.mask[:, batch.offset :])
        self.fused: Mapping[Module, Forward] | None = None
        self.constants: Constants | None = None

    def _columns(self) -> Tensor:
        """Where logits are read, ``[row target]``: at the target's places, and at the subject of essence texts."""
        batch = self.batch
        last = torch.cat([batch.prompt_last, batch.subject_last[batch.n_texts :]]) - batch.offset
        width = batch.tokens.ids.shape[1] - batch.offset
        steps = torch.arange(batch.target.shape[1], device=last.device)
        steps = steps * (torch.arange(len(last), device=last.device) < batch.n_texts)[:, None]
        return (last[:, None] + steps).clamp(max=width - 1)

    def run(self, edited: bool = True) -> Float[Tensor, "row target vocab"]:
        """The logits at ``columns``, with deltas or without; activations go to ``store``."""
        with attached(self.model, [*self.reading, *(self.adding if edited else ())]):
            if self.fused is None:
                self.fused = fused(self.model)
            with replaced(self.fused), self._constant() if edited else nullcontext():
                return self.prefixes.run_on(self.model, self.suffixes, self.columns)[0]

    def _constant(self) -> AbstractContextManager[None]:
        if self.constants is not None:
            return self.constants.put()
        self.constants = Constants(self.model)
        return self.constants.recorded()

    def record_vanilla(self) -> None:
        """Keeps what the restriction compares with, of the run just made."""
        if self.restriction is not None:
            read = {point: self.store[point].detach() for point in self.restriction.points}
            self.vanilla = self.restriction.observe(read, self.batch)

    def values(self) -> Float[Tensor, "text site d_model"]:
        """Of the run just made: the values at the subject-last tokens of the rewriting texts, before delta."""
        batch = self.batch
        rows = torch.arange(batch.n_texts, device=batch.owner.device)
        stored = torch.stack([self.store[point].detach().to(rows.device) for point in self.points], dim=2)
        return stored[rows, batch.subject_last[: batch.n_texts] - batch.offset].to(self.dtype)

    def target(self, logits: Tensor) -> tuple[Float[Tensor, " text"], Bool[Tensor, " text"]]:
        """Negative log-probability of the target, averaged over its tokens, and whether all are the first choice."""
        batch = self.batch
        present: Bool[Tensor, "text target"] = batch.target != IGNORED
        log_probs = logits[: batch.n_texts].to(self.dtype).log_softmax(-1)
        token = log_probs.gather(-1, batch.target.clamp(min=0)[..., None]).squeeze(-1)
        first = ((log_probs.argmax(-1) == batch.target) | ~present).all(1)
        return -(token * present).sum(1) / present.sum(1), first

    def essence_log_probs(self, logits: Tensor) -> Float[Tensor, "essence vocab"]:
        """Of the essence texts in the batch, at their subject-last tokens."""
        return logits[self.batch.n_texts :, 0].to(self.dtype).log_softmax(-1)

    def penalty(self) -> Penalty:
        """The restriction's, of the run just made."""
        if self.restriction is None:
            return Penalty(torch.zeros(self.batch.n_texts, dtype=self.dtype, device=self.batch.owner.device))
        return self.restriction.penalty(self.vanilla, self.restriction.observe(self.store, self.batch), self.batch)


class RecomputedPass(Pass):
    """The same for one of several that do not fit into memory together: what it held is computed again where needed."""

    def run(self, edited: bool = True) -> Float[Tensor, "row target vocab"]:
        logits: Tensor = checkpoint(super().run, edited, use_reentrant=False, preserve_rng_state=False)
        return logits


class WholePass(Pass):
    """The same over whole texts, everything computed anew at every step: the reference for the other."""

    def run(self, edited: bool = True) -> Float[Tensor, "row target vocab"]:
        batch, hooks = self.batch, [*self.reading, *(self.adding if edited else ())]
        with attached(self.model, hooks):
            logits = run(self.model, batch.tokens)
        return logits[torch.arange(len(logits), device=logits.device)[:, None], self.columns]


class Witness:
    """Whole rewriting texts of some requests, on which a restriction looks at low-rank updates."""

    def __init__(self, model: TransformerBridge, texts: Sequence[RequestTexts], restriction: LossTerm) -> None:
        self.model, self.restriction = model, restriction
        self.batch = rewriting_batch(model, texts, essence=False)
        with torch.no_grad():
            self.vanilla = self._observe({})

    def _observe(self, updates: Mapping[int, SeenUpdate]) -> Any:
        store: dict[str, Tensor] = {}
        hooks = reading(self.restriction.points, store)
        for layer, update in updates.items():
            rows = update.of(self.batch.owner)
            hooks += updating(layer, rows.keys, rows.values, rows.seen)
        with attached(self.model, hooks):
            run(self.model, self.batch.tokens)
        return self.restriction.observe(store, self.batch)

    def penalty(self, updates: Mapping[int, SeenUpdate]) -> Penalty:
        """The restriction's under updates, gradients kept."""
        return self.restriction.penalty(self.vanilla, self._observe(updates), self.batch)

    def mean_loss(self, updates: Mapping[int, SeenUpdate]) -> Float[Tensor, " request"]:
        """The weighted term of each request under updates."""
        with torch.no_grad():
            loss = self.penalty(updates).loss
        owner = self.batch.owner[: self.batch.n_texts]
        return torch.stack([loss[owner == r].mean() for r in range(len(self.batch.texts))])
