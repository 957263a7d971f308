"""What all locate-then-edit editors share: the texts of their requests, and activations at the subjects."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.hooks import read
from attn_drift.requests import SLOT, EditRequest
from attn_drift.rewriting import RequestTexts, RewritingText, request_texts
from attn_drift.sampling import sample_contexts
from attn_drift.tokens import pad

Lengths = tuple[tuple[int, int], ...]


def listed(requests: EditRequest | Sequence[EditRequest]) -> list[EditRequest]:
    """One request, or several, as a list.

    Raises:
        ValueError: there are none.
    """
    several = [requests] if isinstance(requests, EditRequest) else list(requests)
    if not several:
        raise ValueError("no requests were given; expected at least one")
    return several


def texts_of(
    model: TransformerBridge,
    requests: Sequence[EditRequest],
    contexts: Sequence[str] | None,
    lengths: Lengths,
    generator: torch.Generator | None,
) -> list[RequestTexts]:
    """The texts of each request, in the contexts given, or in contexts sampled from the model.

    Raises:
        ValueError: a bad context, or a text that is longer than the model's context, before the model runs.
    """
    if contexts is None:
        _check_room(model, requests, lengths)
        contexts = sample_contexts(model, generator, lengths)
    return [request_texts(model, request, contexts) for request in requests]


def _check_room(model: TransformerBridge, requests: Sequence[EditRequest], lengths: Lengths) -> None:
    """Raises a ValueError for a request that would not fit the model's context behind a sampled context."""
    # A full stop and a space follow the sampled tokens.
    room = model.cfg.n_ctx - max((length for length, _ in lengths), default=0) - 2
    for request in requests:
        for text in request_texts(model, request, [SLOT]).rewriting:
            if len(text.completion.tokens) > room:
                raise ValueError(
                    f"with a sampled context before it, the prompt ({len(text.completion.tokens)} tokens) has more "
                    f"tokens than the model's context of {model.cfg.n_ctx}; shorten it or hand in contexts: "
                    f"{text.completion.tokens.text[:60]!r}"
                )


def at_subjects(
    model: TransformerBridge, points: Sequence[str], texts: Sequence[RewritingText], stop: int
) -> list[Float[Tensor, "text width"]]:
    """The activations at the subject-last tokens of some texts, at each of some points below layer ``stop``."""
    batch = pad(model, [text.completion.tokens for text in texts])
    store = read(model, batch, points, stop_at_layer=stop)
    columns = batch.columns([text.subject_last for text in texts])
    rows = torch.arange(len(columns), device=columns.device)
    return [store[point].to(columns.device)[rows, columns] for point in points]
