"""The value optimiser that all locate-then-edit editors share (method.md, section 2).

    L = NLL + kl_factor * KL_essence + weight_decay * |delta| / |v0|^2 + restriction

Adam on ``delta`` alone, for many requests at once: each has its own delta, its own stop, its own loss terms.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isfinite

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.history import EditHistory
from attn_drift.hooks import adding, attached, reading, run, value_point
from attn_drift.restriction import LossTerm, Penalty
from attn_drift.rewriting import IGNORED, RequestTexts, RewritingBatch, rewriting_batch

# Logits of one step, in numbers: requests are optimised in groups that stay below it (one at least).
LOGITS_AT_ONCE = 2**27


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
    """

    steps: int = 20
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 4.0
    kl_factor: float = 0.0625
    stop_loss: float = 0.05

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
        delta: what is to be added to the value, ``v* = v0 + delta``.
        v0: the value at the subject-last token of the context-free prompt, before the edit.
        history: every loss term at every evaluation.
    """

    delta: Float[Tensor, " d_model"]
    v0: Float[Tensor, " d_model"]
    history: EditHistory


def optimise_values(
    model: TransformerBridge,
    layer: int,
    texts: Sequence[RequestTexts],
    config: ValueConfig,
    restriction: LossTerm | None = None,
) -> list[OptimisedValue]:
    """Optimises a vector at the MLP output of ``layer``, at the subject-last token, for each request.

    Requests do not influence each other; they share batches only for speed.
    """
    results: list[OptimisedValue] = []
    with _frozen(model), tqdm(total=len(texts), desc="optimising values", leave=False) as progress:
        for group in _groups(model, texts):
            results += _Optimisation(model, layer, rewriting_batch(model, group), config, restriction).run()
            progress.update(len(group))
    return results


def _groups(model: TransformerBridge, texts: Sequence[RequestTexts]) -> Iterator[list[RequestTexts]]:
    """Consecutive requests whose padded texts stay within ``LOGITS_AT_ONCE``."""
    group: list[RequestTexts] = []
    rows = width = 0
    for request in texts:
        longest = max(len(request.essence), *(len(text.completion.tokens) for text in request.rewriting))
        size = len(request.rewriting) + 1
        if group and (rows + size) * max(width, longest) * model.cfg.d_vocab > LOGITS_AT_ONCE:
            yield group
            group, rows, width = [], 0, 0
        group.append(request)
        rows, width = rows + size, max(width, longest)
    yield group


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


@dataclass(eq=False)
class _Terms:
    """Weighted loss terms of each request at one evaluation."""

    nll: Float[Tensor, " request"]
    kl: Float[Tensor, " request"]
    decay: Float[Tensor, " request"]
    restriction: Float[Tensor, " request"]
    p_target: Float[Tensor, " request"]
    selected: Float[Tensor, "request layer head"] | None

    @property
    def loss(self) -> Float[Tensor, " request"]:
        return self.nll + self.kl + self.decay + self.restriction

    def columns(self) -> Float[Tensor, "request term"]:
        """In the order of `EditHistory.COLUMNS`."""
        terms = (self.loss, self.nll, self.kl, self.decay, self.restriction, self.p_target)
        return torch.stack(terms, dim=1).detach().cpu()


class _Optimisation:
    """One batch of requests, optimised together."""

    def __init__(
        self,
        model: TransformerBridge,
        layer: int,
        batch: RewritingBatch,
        config: ValueConfig,
        restriction: LossTerm | None,
    ) -> None:
        self.model, self.layer, self.batch, self.config, self.restriction = model, layer, batch, config, restriction
        weight = next(model.parameters())
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        shape = (len(batch.texts), model.cfg.d_model)
        self.delta = torch.zeros(shape, dtype=self.dtype, device=batch.tokens.ids.device, requires_grad=True)
        self.store: dict[str, Tensor] = {}
        points = [value_point(layer), *([] if restriction is None else restriction.points)]
        # Reading comes before adding, so that the stored value is the vanilla one.
        self.hooks = [
            *reading(points, self.store),
            adding(layer, batch.subject_last, lambda: self.delta[batch.owner]),
        ]

    def run(self) -> list[OptimisedValue]:
        """Optimises until every request is done or the steps are spent."""
        adam = torch.optim.Adam([self.delta], lr=self.config.learning_rate)
        active = torch.ones(len(self.delta), dtype=torch.bool, device=self.delta.device)
        columns: list[Tensor] = []
        selected: list[Tensor] = []
        lengths = torch.zeros(len(self.delta), dtype=torch.long)
        with attached(self.model, self.hooks):
            for step in range(self.config.steps):
                logits = run(self.model, self.batch.tokens)
                if step == 0:
                    self._record_vanilla(logits)
                terms = self._terms(logits)
                columns.append(terms.columns())
                if terms.selected is not None:
                    selected.append(terms.selected.cpu())
                lengths += active.cpu()
                active &= terms.loss.detach() >= self.config.stop_loss
                if step == self.config.steps - 1 or not active.any():
                    break
                self._step(adam, terms, active)
        return self._results(columns, selected, lengths.tolist())

    def _record_vanilla(self, logits: Tensor) -> None:
        batch = self.batch
        rows = torch.arange(len(batch.owner), device=logits.device)
        values = self.store[value_point(self.layer)].to(logits.device)[rows, batch.subject_last]
        values = values.detach().to(self.delta)
        # The first text of every request is context-free.
        first = torch.stack([(batch.owner[: batch.n_texts] == r).nonzero()[0, 0] for r in range(len(batch.texts))])
        self.v0: Float[Tensor, "request d_model"] = values[first]
        self.v0_norm = self.v0.norm(dim=1)
        self.essence = self._essence_log_probs(logits).detach()
        if self.restriction is not None:
            self.vanilla = self.restriction.observe(
                {point: self.store[point].detach() for point in self.restriction.points}, batch
            )

    def _terms(self, logits: Tensor) -> _Terms:
        batch, config = self.batch, self.config
        per_text = self._target_nll(logits)
        penalty = self._penalty(per_text)
        now = self._essence_log_probs(logits)
        kl = (self.essence.exp() * (self.essence - now)).sum(-1)
        return _Terms(
            nll=batch.mean_per_request(per_text),
            kl=config.kl_factor * kl,
            decay=config.weight_decay * self.delta.norm(dim=1) / self.v0_norm.square(),
            restriction=batch.mean_per_request(penalty.loss),
            p_target=batch.mean_per_request((-per_text.detach() * (batch.target != IGNORED).sum(1)).exp()),
            selected=None if penalty.selected is None else batch.mean_per_request(penalty.selected),
        )

    def _penalty(self, like: Tensor) -> Penalty:
        if self.restriction is None:
            return Penalty(torch.zeros_like(like))
        return self.restriction.penalty(self.vanilla, self.restriction.observe(self.store, self.batch), self.batch)

    def _target_nll(self, logits: Tensor) -> Float[Tensor, " text"]:
        """Negative log-probability of the target, averaged over its tokens."""
        batch = self.batch
        present: Bool[Tensor, "text target"] = batch.target != IGNORED
        columns = batch.prompt_last[:, None] + torch.arange(batch.target.shape[1], device=logits.device)
        columns = columns.clamp(max=logits.shape[1] - 1)
        rows = torch.arange(batch.n_texts, device=logits.device)[:, None]
        log_probs = logits[rows, columns].to(self.dtype).log_softmax(-1)
        token = log_probs.gather(-1, batch.target.clamp(min=0)[..., None]).squeeze(-1)
        return -(token * present).sum(1) / present.sum(1)

    def _essence_log_probs(self, logits: Tensor) -> Float[Tensor, "request vocab"]:
        rows = torch.arange(self.batch.n_texts, len(self.batch.owner), device=logits.device)
        return logits[rows, self.batch.subject_last[rows]].to(self.dtype).log_softmax(-1)

    def _step(self, adam: torch.optim.Adam, terms: _Terms, active: Bool[Tensor, " request"]) -> None:
        """One step of Adam for the requests that are not done, and the projection on the ball."""
        (self.delta.grad,) = torch.autograd.grad(terms.loss.sum(), self.delta)
        before = self.delta.detach().clone()
        adam.step()
        with torch.no_grad():
            radius = self.config.clamp * self.v0_norm
            shrink = (radius / self.delta.norm(dim=1).clamp(min=torch.finfo(self.dtype).tiny)).clamp(max=1)
            self.delta.copy_(torch.where(active[:, None], self.delta * shrink[:, None], before))

    def _results(self, columns: list[Tensor], selected: list[Tensor], lengths: list[int]) -> list[OptimisedValue]:
        terms = torch.stack(columns, dim=1)
        heads = torch.stack(selected, dim=1) if selected else None
        return [
            OptimisedValue(
                delta=self.delta[r].detach().clone(),
                v0=self.v0[r].clone(),
                history=EditHistory(terms[r, :n].clone(), None if heads is None else heads[r, :n].clone()),
            )
            for r, n in enumerate(lengths)
        ]
