"""The value optimiser that all locate-then-edit editors share (method.md, section 2).

    L = NLL + kl_factor * KL_essence + weight_decay * |delta| / |v0|^2 + restriction

Adam on ``delta`` alone, for many requests at once: each has its own delta, its own stop, its own loss terms. Where an
editor optimises vectors at several sites (PMET), delta and v0 have a row for each, and the decay is summed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.history import EditHistory
from attn_drift.hooks import adding, attached, cached, reading, run, run_on, updating
from attn_drift.restriction import LossTerm, Penalty
from attn_drift.rewriting import IGNORED, RequestTexts, RewritingBatch, rewriting_batch, suffix_batches

# Logits of one step, in numbers: requests are optimised in groups that stay below it (one at least).
LOGITS_AT_ONCE = 2**27


Deltas = Float[Tensor, "request site d_model"]
# Keys and values of a low-rank update, shared by all requests, or with a leading axis of requests.
Update = tuple[Float[Tensor, "*request rank d_mlp"], Float[Tensor, "*request rank d_model"]]
# The updates by layer that would be written for given deltas, with their gradients.
Writing = Callable[[Deltas], Mapping[int, Update]]


@dataclass(frozen=True)
class Settled:
    """What changes for a request once every token of its target is the first choice in every text (PMET's rule).

    Attributes:
        nll: weight of the negative log-probability from the next step on, as long as that holds.
        kl: the request is done when its weighted essence term is at most this.
    """

    nll: float = 0.1
    kl: float = 0.01

    def __post_init__(self) -> None:
        if not (0 <= self.nll < inf and 0 <= self.kl < inf):
            raise ValueError(f"nll is {self.nll} and kl {self.kl}; expected neither to be negative")


@dataclass(frozen=True, kw_only=True)
class ValueConfig:
    """How a value is optimised.

    Attributes:
        steps: evaluations of the loss; each but the last is followed by a step of Adam.
        learning_rate: of Adam.
        weight_decay: weight of ``|delta| / |v0|^2``, a norm over a squared norm.
        clamp: radius of the ball that delta is kept in, in units of ``|v0|``.
        kl_factor: weight of the essence term.
        stop_loss: a request whose loss is below it is done.
        settled: a further rule for when it is done; none when None.
    """

    steps: int = 20
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 4.0
    kl_factor: float = 0.0625
    stop_loss: float = 0.05
    settled: Settled | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; expected at least 1")
        if not (0 < self.learning_rate < inf and 0 < self.clamp < inf):
            raise ValueError(
                f"learning_rate is {self.learning_rate} and clamp {self.clamp}; expected both to be positive"
            )
        if not (0 <= self.weight_decay < inf and 0 <= self.kl_factor < inf):
            raise ValueError(
                f"weight_decay is {self.weight_decay} and kl_factor {self.kl_factor}; expected neither to be negative"
            )
        if not isfinite(self.stop_loss):
            raise ValueError(f"stop_loss is {self.stop_loss}; expected a number, negative for no early stop")


@dataclass(frozen=True, eq=False)
class OptimisedValue:
    """The result for one request.

    Attributes:
        deltas: what is to be added at each site.
        v0s: the activations at the subject-last token of the context-free prompt, before the edit.
        history: every loss term at every evaluation.
    """

    deltas: Float[Tensor, "site d_model"]
    v0s: Float[Tensor, "site d_model"]
    history: EditHistory

    @property
    def delta(self) -> Float[Tensor, " d_model"]:
        """What is to be added to the value at the first site, the one that is written: ``v* = v0 + delta``."""
        return self.deltas[0]

    @property
    def v0(self) -> Float[Tensor, " d_model"]:
        """The value at the first site before the edit."""
        return self.v0s[0]


def optimise_values(
    model: TransformerBridge,
    points: Sequence[str],
    texts: Sequence[RequestTexts],
    config: ValueConfig,
    restriction: LossTerm | None = None,
    writing: Writing | None = None,
    whole: bool = False,
) -> list[OptimisedValue]:
    """Optimises vectors that are added to the activations at ``points``, at the subject-last token, for each request.

    Requests do not influence each other; they share batches only for speed. Tokens before the subject-last ones are run
    once and cached, unless ``whole`` asks for whole texts at every step: the reference that this is tested against.

    With ``writing``, the restriction looks at whole texts under the updates that it gives for the deltas of all
    requests, which then run together, not at the texts on which the deltas are optimised.
    """
    results: list[OptimisedValue] = []
    with _frozen(model), tqdm(total=len(texts), desc="optimising values", leave=False) as progress:
        for group in _alone(model, texts) if writing is None else [list(texts)]:
            batches = [rewriting_batch(model, group)] if whole else suffix_batches(model, group)
            optimisation = _Optimisation(model, points, group, batches, config, None if writing else restriction)
            if writing and restriction:
                optimisation.witness, optimisation.writing = Witness(model, group, restriction), writing
            results += optimisation.run()
            progress.update(len(group))
    return results


def restricted_by_updates(
    model: TransformerBridge, texts: Sequence[RequestTexts], restriction: LossTerm, updates: Mapping[int, Update]
) -> list[float]:
    """The weighted restriction term of each request under low-rank updates, on whole texts."""
    found: list[float] = []
    for group in _alone(model, texts):
        own = slice(len(found), len(found) + len(group))
        seen = {
            layer: (keys[own], values[own]) if keys.ndim == 3 else (keys, values)
            for layer, (keys, values) in updates.items()
        }
        found += Witness(model, group, restriction).mean_loss(seen).tolist()
    return found


def groups(model: TransformerBridge, units: Sequence[Sequence[RequestTexts]]) -> Iterator[list[Sequence[RequestTexts]]]:
    """Consecutive units, each of requests that belong together, whose padded texts stay within ``LOGITS_AT_ONCE``."""
    group: list[Sequence[RequestTexts]] = []
    rows = width = 0
    for unit in units:
        texts = [text.completion.tokens for request in unit for text in request.rewriting]
        longest = max(len(tokens) for tokens in [*texts, *(request.essence for request in unit)])
        size = len(texts) + len(unit)
        if group and (rows + size) * max(width, longest) * model.cfg.d_vocab > LOGITS_AT_ONCE:
            yield group
            group, rows, width = [], 0, 0
        group.append(unit)
        rows, width = rows + size, max(width, longest)
    yield group


def _alone(model: TransformerBridge, texts: Sequence[RequestTexts]) -> Iterator[list[RequestTexts]]:
    """`groups` of requests that do not belong together."""
    for group in groups(model, [[request] for request in texts]):
        yield [request for unit in group for request in unit]


@contextmanager
def _frozen(model: TransformerBridge) -> Iterator[None]:
    """A block in which no weight takes gradients: only delta is optimised."""
    thawed = [weight for weight in model.original_model.parameters() if weight.requires_grad]
    for weight in thawed:
        weight.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for weight in thawed:
            weight.requires_grad_(True)


class Witness:
    """Whole rewriting texts of some requests, on which a restriction looks at low-rank updates."""

    def __init__(self, model: TransformerBridge, texts: Sequence[RequestTexts], restriction: LossTerm) -> None:
        self.model, self.restriction = model, restriction
        self.batch = rewriting_batch(model, texts, essence=False)
        with torch.no_grad():
            self.vanilla = self._observe({})

    def _observe(self, updates: Mapping[int, Update]) -> Any:
        store: dict[str, Tensor] = {}
        hooks = reading(self.restriction.points, store)
        for layer, (keys, values) in updates.items():
            several = keys.ndim == 3
            rows = (keys[self.batch.owner], values[self.batch.owner]) if several else (keys, values)
            hooks += updating(layer, *rows)
        with attached(self.model, hooks):
            run(self.model, self.batch.tokens)
        return self.restriction.observe(store, self.batch)

    def penalty(self, updates: Mapping[int, Update]) -> Penalty:
        """The restriction's under updates, gradients kept."""
        return self.restriction.penalty(self.vanilla, self._observe(updates), self.batch)

    def mean_loss(self, updates: Mapping[int, Update]) -> Float[Tensor, " request"]:
        """The weighted term of each request under updates."""
        with torch.no_grad():
            loss = self.penalty(updates).loss
        owner = self.batch.owner[: self.batch.n_texts]
        return torch.stack([loss[owner == r].mean() for r in range(len(self.batch.texts))])


@dataclass(eq=False)
class _Terms:
    """Weighted loss terms of each request at one evaluation."""

    nll: Float[Tensor, " request"]
    kl: Float[Tensor, " request"]
    decay: Float[Tensor, " request"]
    restriction: Float[Tensor, " request"]
    p_target: Float[Tensor, " request"]
    first_choice: Bool[Tensor, " request"]
    selected: Float[Tensor, "request layer head"] | None

    @property
    def loss(self) -> Float[Tensor, " request"]:
        return self.nll + self.kl + self.decay + self.restriction

    def columns(self) -> Float[Tensor, "request term"]:
        """In the order of `EditHistory.COLUMNS`."""
        terms = (self.loss, self.nll, self.kl, self.decay, self.restriction, self.p_target)
        return torch.stack(terms, dim=1).detach().cpu()


class _Part:
    """A batch of texts that is run together, and its share of the loss."""

    def __init__(
        self,
        model: TransformerBridge,
        points: Sequence[str],
        batch: RewritingBatch,
        restriction: LossTerm | None,
        delta: Deltas,
    ) -> None:
        self.model, self.points, self.batch = model, points, batch
        # Essence texts have nothing to restrict.
        self.restriction = restriction if batch.n_texts else None
        self.dtype = delta.dtype
        self.store: dict[str, Tensor] = {}
        read = [*points, *([] if self.restriction is None else self.restriction.points)]
        columns = batch.subject_last - batch.offset

        def vectors_of(site: int) -> Callable[[], Float[Tensor, "text d_model"]]:
            return lambda: delta[batch.owner, site]

        # Reading comes before adding, so that the stored values are the vanilla ones.
        added = [adding(point, columns, vectors_of(site)) for site, point in enumerate(points)]
        self.hooks = [*reading(read, self.store), *added]
        self.cache = cached(model, batch.tokens, batch.offset) if batch.offset else None

    def run(self) -> Float[Tensor, "row pos vocab"]:
        """The logits, from the batch's offset on; activations go to ``store``."""
        batch = self.batch
        with attached(self.model, self.hooks):
            if self.cache is None:
                return run(self.model, batch.tokens)
            return run_on(self.model, batch.tokens, self.cache, batch.offset)

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
        columns = (batch.prompt_last - batch.offset)[:, None]
        columns = columns + torch.arange(batch.target.shape[1], device=logits.device)
        columns = columns.clamp(max=logits.shape[1] - 1)
        rows = torch.arange(batch.n_texts, device=logits.device)[:, None]
        log_probs = logits[rows, columns].to(self.dtype).log_softmax(-1)
        token = log_probs.gather(-1, batch.target.clamp(min=0)[..., None]).squeeze(-1)
        first = ((log_probs.argmax(-1) == batch.target) | ~present).all(1)
        return -(token * present).sum(1) / present.sum(1), first

    def essence_log_probs(self, logits: Tensor) -> Float[Tensor, "essence vocab"]:
        """Of the essence texts in the batch, at their subject-last tokens."""
        batch = self.batch
        rows = torch.arange(batch.n_texts, len(batch.owner), device=logits.device)
        return logits[rows, batch.subject_last[rows] - batch.offset].to(self.dtype).log_softmax(-1)

    def penalty(self) -> Penalty:
        """The restriction's, of the run just made."""
        if self.restriction is None:
            return Penalty(torch.zeros(self.batch.n_texts, dtype=self.dtype, device=self.batch.owner.device))
        return self.restriction.penalty(self.vanilla, self.restriction.observe(self.store, self.batch), self.batch)


class _Optimisation:
    """Some requests, optimised together."""

    def __init__(
        self,
        model: TransformerBridge,
        points: Sequence[str],
        texts: Sequence[RequestTexts],
        batches: Sequence[RewritingBatch],
        config: ValueConfig,
        restriction: LossTerm | None,
    ) -> None:
        self.config = config
        self.witness: Witness | None = None
        self.writing: Writing = lambda delta: {}
        weight = next(model.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shape = (len(texts), len(points), model.cfg.d_model)
        self.delta = torch.zeros(shape, dtype=dtype, device=batches[0].owner.device, requires_grad=True)
        self.nll_weight = torch.ones(len(texts), dtype=dtype, device=self.delta.device)
        self.parts = [_Part(model, points, batch, restriction, self.delta) for batch in batches]
        # Of all texts together, in the order of their places.
        self.text_order = torch.cat([batch.place[: batch.n_texts] for batch in batches]).argsort()
        self.essence_order = torch.cat([batch.place[batch.n_texts :] for batch in batches]).argsort()
        owner = torch.cat([batch.owner[: batch.n_texts] for batch in batches])[self.text_order]
        self.member = owner == torch.arange(len(texts), device=owner.device)[:, None]

    def run(self) -> list[OptimisedValue]:
        """Optimises until every request is done or the steps are spent."""
        adam = torch.optim.Adam([self.delta], lr=self.config.learning_rate)
        active = torch.ones(len(self.delta), dtype=torch.bool, device=self.delta.device)
        columns: list[Tensor] = []
        selected: list[Tensor] = []
        lengths = torch.zeros(len(self.delta), dtype=torch.long)
        for step in range(self.config.steps):
            logits = [part.run() for part in self.parts]
            if step == 0:
                self._record_vanilla(logits)
            terms = self._terms(logits)
            columns.append(terms.columns())
            if terms.selected is not None:
                selected.append(terms.selected.cpu())
            lengths += active.cpu()
            active &= ~self._done(terms)
            if step == self.config.steps - 1 or not active.any():
                break
            self._step(adam, terms, active)
        return self._results(columns, selected, lengths.tolist())

    def _done(self, terms: _Terms) -> Bool[Tensor, " request"]:
        """Which requests need no further step; sets the weights of the next step's NLL."""
        done = terms.loss.detach() < self.config.stop_loss
        settled = self.config.settled
        if settled is not None:
            done |= terms.first_choice & (terms.kl.detach() <= settled.kl)
            self.nll_weight = torch.where(terms.first_choice, settled.nll, 1.0).to(self.nll_weight)
        return done

    def _record_vanilla(self, logits: list[Tensor]) -> None:
        for part in self.parts:
            part.record_vanilla()
        values = torch.cat([part.values() for part in self.parts])[self.text_order]
        # The first text of every request is context-free.
        self.v0: Deltas = values[self.member.int().argmax(1)]
        self.v0_norm = self.v0.norm(dim=2)
        self.essence = self._essence(logits).detach()

    def _essence(self, logits: list[Tensor]) -> Float[Tensor, "request vocab"]:
        found = [part.essence_log_probs(part_logits) for part, part_logits in zip(self.parts, logits, strict=True)]
        return torch.cat(found)[self.essence_order]

    def _together(self, per_part: Sequence[Tensor]) -> Tensor:
        """Of all rewriting texts, in the order of their places: ``[text ...]``."""
        return torch.cat(list(per_part))[self.text_order]

    def _mean_per_request(self, per_text: Tensor) -> Tensor:
        """Averages over each request's rewriting texts: ``[text ...] -> [request ...]``."""
        # A product with a matrix, since index_add is not deterministic on CUDA.
        shares = self.member.to(per_text.dtype) / self.member.sum(1, keepdim=True)
        averaged: Tensor = torch.tensordot(shares, per_text, dims=1)
        return averaged

    def _penalty(self) -> Penalty:
        """The restriction's, of all rewriting texts."""
        if self.witness is not None:
            return self.witness.penalty(self.writing(self.delta))
        penalties = [part.penalty() for part in self.parts]
        selected = [penalty.selected for penalty in penalties if penalty.selected is not None]
        losses = self._together([penalty.loss for penalty in penalties])
        return Penalty(losses, self._together(selected) if selected else None)

    def _terms(self, logits: list[Tensor]) -> _Terms:
        config = self.config
        targets = [part.target(part_logits) for part, part_logits in zip(self.parts, logits, strict=True)]
        nll = self._together([loss for loss, _ in targets])
        missed = self._mean_per_request(self._together([~first for _, first in targets]).to(nll.dtype))
        n_tokens = self._together([(part.batch.target != IGNORED).sum(1) for part in self.parts])
        penalty = self._penalty()
        now = self._essence(logits)
        kl = (self.essence.exp() * (self.essence - now)).sum(-1)
        return _Terms(
            nll=self.nll_weight * self._mean_per_request(nll),
            kl=config.kl_factor * kl,
            decay=config.weight_decay * (self.delta.norm(dim=2) / self.v0_norm.square()).sum(1),
            restriction=self._mean_per_request(penalty.loss),
            p_target=self._mean_per_request((-nll.detach() * n_tokens).exp()),
            first_choice=missed == 0,
            selected=None if penalty.selected is None else self._mean_per_request(penalty.selected),
        )

    def _step(self, adam: torch.optim.Adam, terms: _Terms, active: Bool[Tensor, " request"]) -> None:
        """One step of Adam for the requests that are not done, and the projection on the ball."""
        (self.delta.grad,) = torch.autograd.grad(terms.loss.sum(), self.delta)
        before = self.delta.detach().clone()
        adam.step()
        with torch.no_grad():
            radius = self.config.clamp * self.v0_norm
            shrink = (radius / self.delta.norm(dim=2).clamp(min=torch.finfo(self.delta.dtype).tiny)).clamp(max=1)
            self.delta.copy_(torch.where(active[:, None, None], self.delta * shrink[..., None], before))

    def _results(self, columns: list[Tensor], selected: list[Tensor], lengths: list[int]) -> list[OptimisedValue]:
        terms = torch.stack(columns, dim=1)
        heads = torch.stack(selected, dim=1) if selected else None
        return [
            OptimisedValue(
                deltas=self.delta[r].detach().clone(),
                v0s=self.v0[r].clone(),
                history=EditHistory(terms[r, :n].clone(), None if heads is None else heads[r, :n].clone()),
            )
            for r, n in enumerate(lengths)
        ]
