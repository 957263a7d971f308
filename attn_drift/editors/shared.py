"""What all locate-then-edit editors share: the texts of their requests, and activations at the subjects."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.edits import Edit
from attn_drift.hooks import read
from attn_drift.models import down_projection
from attn_drift.requests import SLOT, EditRequest
from attn_drift.restriction import Restriction
from attn_drift.rewriting import RequestTexts, RewritingText, request_texts
from attn_drift.sampling import sample_contexts
from attn_drift.tokens import pad
from attn_drift.values import ValueConfig

log = logging.getLogger(__name__)

# Norm of an update, in units of the weight's, from which on it is said to explode.
EXPLODED = 1.0

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


def method_record(editor: str, config: ValueConfig, restrict: Restriction | None) -> dict[str, Any]:
    """What an edit keeps of how it was made."""
    return {"editor": editor, "config": asdict(config), "restrict": None if restrict is None else repr(restrict)}


def warn_of_explosion(model: TransformerBridge, edit: Edit) -> None:
    """Says in the log where an update is so large that the model will likely not survive it."""
    for layer, update in edit.updates.items():
        norm, weight = float(update.norm()), float(down_projection(model, layer).detach().float().norm())
        if norm > EXPLODED * weight:
            log.warning(
                "the update of layer %d explodes: its norm is %.3g, that of the weight %.3g (%r)",
                layer,
                norm,
                weight,
                edit,
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
