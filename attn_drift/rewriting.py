"""The texts on which an edit's value is optimised (method.md, section 2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.requests import SLOT, EditRequest, check_contexts, fill, find_subject
from attn_drift.tokens import Completion, TokenBatch, Tokens, encode, encode_completion, pad

IGNORED = -100


@dataclass(frozen=True)
class RewritingText:
    """One text of a request: context, prompt, and all target tokens but the last.

    Attributes:
        completion: the tokens, prompt-last position and target.
        subject_last: index of the subject-last token ``s_b``.
        wording: which of the request's wordings it uses.
    """

    completion: Completion
    subject_last: int
    wording: int


@dataclass(frozen=True)
class RequestTexts:
    """The texts of one request: its rewriting texts, a context-free one first, and the essence text ``"{s} is a"``."""

    request: EditRequest
    rewriting: tuple[RewritingText, ...]
    essence: Tokens
    essence_subject_last: int


def request_texts(model: TransformerBridge, request: EditRequest, contexts: Sequence[str]) -> RequestTexts:
    """Tokenizes the texts of a request: as many as there are contexts, spread over the wordings.

    Every wording has one text without context; the other contexts are dealt to the wordings in turn.

    Raises:
        ValueError: a bad context, or a text longer than the model's context.
    """
    contexts, wordings = check_contexts(contexts), range(len(request.wordings))
    pairs = [(SLOT, wording) for wording in wordings]
    spare = max(0, len(contexts) - len(pairs))
    pairs += [(context, j % len(wordings)) for j, context in enumerate(contexts[1 : 1 + spare])]
    rewriting = tuple(_rewriting_text(model, request, context, wording) for context, wording in pairs)
    essence = encode(model, f"{request.subject} is a")
    subject_end = find_subject(essence.text, request.subject)[1]
    return RequestTexts(request, rewriting, essence, essence.last_covering(subject_end - 1))


def _rewriting_text(model: TransformerBridge, request: EditRequest, context: str, wording: int) -> RewritingText:
    template = fill(context, request.wordings[wording])
    prompt = fill(template, request.subject)
    completion = encode_completion(model, prompt, request.target_new)
    # The place in the template is an occurrence; another may follow it.
    subject_end = find_subject(prompt, request.subject, template.index(SLOT))[1]
    return RewritingText(completion, completion.tokens.last_covering(subject_end - 1), wording)


@dataclass(frozen=True)
class RewritingBatch:
    """The texts of several requests in one padded batch: first all rewriting texts, then one essence text a request.

    Attributes:
        texts: per request.
        tokens: the padded rows, ``text`` rewriting texts and ``request`` essence texts.
        owner: the request of each row.
        subject_last: column of the subject-last token of each row.
        prompt_last: column of the prompt-last token of each rewriting text.
        target: the target's tokens of each rewriting text, filled up with -100.
    """

    texts: tuple[RequestTexts, ...]
    tokens: TokenBatch
    owner: Int[Tensor, " row"]
    subject_last: Int[Tensor, " row"]
    prompt_last: Int[Tensor, " text"]
    target: Int[Tensor, "text target"]

    @property
    def n_texts(self) -> int:
        """Number of rewriting texts."""
        return len(self.prompt_last)

    def mean_per_request(self, per_text: Tensor) -> Tensor:
        """Averages over each request's rewriting texts: ``[text ...] -> [request ...]``."""
        # A product with a matrix, since index_add is not deterministic on CUDA.
        member = self.owner[: self.n_texts] == torch.arange(len(self.texts), device=self.owner.device)[:, None]
        shares = member.to(per_text.dtype) / member.sum(1, keepdim=True)
        averaged: Tensor = torch.tensordot(shares, per_text, dims=1)
        return averaged


def rewriting_batch(model: TransformerBridge, texts: Sequence[RequestTexts]) -> RewritingBatch:
    """Pads the texts of several requests to one batch."""
    flat = [(r, text) for r, request in enumerate(texts) for text in request.rewriting]
    tokens = pad(model, [t.completion.tokens for _, t in flat] + [request.essence for request in texts])
    device = tokens.ids.device
    width = max(len(t.completion.target) for _, t in flat)
    target = torch.full((len(flat), width), IGNORED, device=device)
    for i, (_, text) in enumerate(flat):
        target[i, : len(text.completion.target)] = torch.tensor(text.completion.target, device=device)
    subject_last = [t.subject_last for _, t in flat] + [request.essence_subject_last for request in texts]
    return RewritingBatch(
        texts=tuple(texts),
        tokens=tokens,
        owner=torch.tensor([r for r, _ in flat] + list(range(len(texts))), device=device),
        subject_last=tokens.columns(subject_last),
        prompt_last=tokens.starts[: len(flat)]
        + torch.tensor([t.completion.prompt_last for _, t in flat], device=device),
        target=target,
    )
