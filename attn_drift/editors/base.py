"""What all locate-then-edit editors share: the texts of their requests, and activations at the subjects."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.checks import check_kind, check_list, check_pairs, describe
from attn_drift.edits.edit import Edit
from attn_drift.edits.history import EditHistory
from attn_drift.edits.low_rank import LowRankUpdate, MaskedUpdate
from attn_drift.model.hooks import read
from attn_drift.model.loading import down_projection, fingerprint
from attn_drift.model.sampling import check_generator, sample_contexts
from attn_drift.model.tokens import pad
from attn_drift.moments.second_moment import SecondMoment
from attn_drift.prompts import RequestPrompts, RewritingPrompt, request_prompts
from attn_drift.requests import SLOT, EditRequest, check_contexts
from attn_drift.restrictions.base import LossTerm, Restriction
from attn_drift.values.optimize import restricted_by_updates
from attn_drift.values.optimizer import OptimizedValue, ValueConfig

log = logging.getLogger(__name__)

# Leakage of an update from which on it is said to explode.
EXPLODED = 1.0

Lengths = tuple[tuple[int, int], ...]


def listed(requests: EditRequest | Sequence[EditRequest]) -> list[EditRequest]:
    """One request, or several, as a list.

    Raises:
        ValueError: there are none, or something else is among them.
    """
    several = _requests(requests)
    if not several:
        raise ValueError("no requests were given; expected at least one")
    return several


def _requests(requests: EditRequest | Sequence[EditRequest]) -> list[EditRequest]:
    expected = "an EditRequest(prompt, subject, target_new), or a list of them"
    several = [requests] if isinstance(requests, EditRequest) else check_list(requests, "requests", expected)
    for i, request in enumerate(several):
        check_kind(request, EditRequest, f"request {i}", "an EditRequest(prompt, subject, target_new)")
    return several


def check_batches(batches: Sequence[EditRequest | Sequence[EditRequest]]) -> list[list[EditRequest]]:
    """Batches of requests as lists; one request is a batch, too.

    Raises:
        ValueError: there is nothing to edit, something is no request, or a batch asks for one fact twice.
    """
    grouped = [_requests(batch) for batch in check_list(batches, "batches", "a list of batches of requests")]
    if not all(grouped) or not grouped:
        raise ValueError(f"{len(grouped)} batches were given, {sum(not b for b in grouped)} of them without requests")
    for batch in grouped:
        seen: dict[str, EditRequest] = {}
        for request in batch:
            if request.question in seen:
                other = seen[request.question]
                raise ValueError(
                    f"{request.question!r} is asked for twice in one batch ({other.target_new!r} and "
                    f"{request.target_new!r}), so that both would be written; give each fact once"
                )
            seen[request.question] = request
    return grouped


def check_config(config: object, kind: type[ValueConfig]) -> None:
    """Raises a ValueError for anything but settings of an editor: those of another editor that inherits them, too."""
    expected = f"settings of this editor, such as {kind.__name__}.for_model(model)"
    check_kind(config, kind, "config", expected)
    if getattr(config, "editor", None) != getattr(kind, "editor", None):
        raise ValueError(f"config is {describe(config)}; expected {expected}")


def check_lengths(value: object, name: str) -> Lengths:
    """How long sampled contexts are, and how many there are of each length.

    Raises:
        ValueError: anything but pairs of whole numbers of at least 1.
    """
    return check_pairs(value, name, "pairs of a length and a number of contexts, such as ((5, 2), (10, 2))", at_least=1)


def texts_of(
    model: TransformerBridge,
    requests: Sequence[EditRequest],
    contexts: Sequence[str] | None,
    lengths: Lengths,
    generator: torch.Generator | None,
) -> list[RequestPrompts]:
    """The texts of each request, in the contexts given, or in contexts sampled from the model.

    Raises:
        ValueError: a bad context or generator, or a text that is longer than the model's context, before the model
            runs.
    """
    check_generator(generator)
    if contexts is None:
        _check_room(model, requests, lengths)
        contexts = sample_contexts(model, generator, lengths)
    contexts = check_contexts(contexts)
    return [request_prompts(model, request, contexts) for request in requests]


def _check_room(model: TransformerBridge, requests: Sequence[EditRequest], lengths: Lengths) -> None:
    """Raises a ValueError for a request that would not fit the model's context behind a sampled context."""
    # A full stop and a space follow the sampled tokens.
    room = model.cfg.n_ctx - max((length for length, _ in lengths), default=0) - 2
    for request in requests:
        for text in request_prompts(model, request, [SLOT]).rewriting:
            if len(text.completion.tokens) > room:
                raise ValueError(
                    f"with a sampled context before it, the prompt ({len(text.completion.tokens)} tokens) has more "
                    f"tokens than the model's context of {model.cfg.n_ctx}; shorten it or hand in contexts: "
                    f"{text.completion.tokens.text[:60]!r}"
                )


def with_results(
    model: TransformerBridge,
    texts: Sequence[RequestPrompts],
    values: Sequence[OptimizedValue],
    term: LossTerm | None,
    updates: Mapping[int, MaskedUpdate],
) -> list[EditHistory]:
    """The histories of all requests, with what the restriction comes to under the updates as they are written."""
    histories = [value.history for value in values]
    if term is None:
        return histories
    resulted = restricted_by_updates(model, texts, term, updates)
    return [replace(own, resulted=loss) for own, loss in zip(histories, resulted, strict=True)]


def finished(
    model: TransformerBridge,
    editor: str,
    config: ValueConfig,
    restrict: Restriction | None,
    batches: Sequence[Sequence[EditRequest]],
    updates: Sequence[Mapping[int, LowRankUpdate]],
    histories: Sequence[EditHistory],
) -> list[Edit]:
    """Edits of batches of requests, from the updates of each and the histories of all requests in order."""
    method = {"editor": editor, "config": asdict(config), "restrict": None if restrict is None else repr(restrict)}
    identity, remaining = fingerprint(model), iter(histories)
    edits = [
        Edit(update, tuple(batch), identity, model.cfg.model_name, method, tuple(islice(remaining, len(batch))))
        for batch, update in zip(batches, updates, strict=True)
    ]
    if doubtful := [edit for edit in edits if edit.doubts]:
        log.warning("%d of %d edits are in doubt, such as %r", len(doubtful), len(edits), doubtful[0])
    return edits


def warn_of_explosion(model: TransformerBridge, edit: Edit, moments: Mapping[int, SecondMoment]) -> None:
    """Says in the log, with figures, where an update drowns what its layer did, so that the model will not survive."""
    for layer, update in edit.updates.items():
        leakage = moments[layer].leakage(model, update)
        if not leakage <= EXPLODED:
            weight = down_projection(model, layer).detach().float().norm()
            log.warning(
                "the update of layer %d explodes: it changes the values of ordinary keys by %.3g times their size (its "
                "norm is %.3g, that of the weight %.3g): %r",
                layer,
                leakage,
                update.norm(),
                weight,
                edit,
            )


def at_subjects(
    model: TransformerBridge, points: Sequence[str], texts: Sequence[RewritingPrompt], stop: int
) -> list[Float[Tensor, "text width"]]:
    """The activations at the subject-last tokens of some texts, at each of some points below layer ``stop``."""
    batch = pad(model, [text.completion.tokens for text in texts])
    store = read(model, batch, points, stop_at_layer=stop)
    columns = batch.columns([text.subject_last for text in texts])
    rows = torch.arange(len(columns), device=columns.device)
    return [store[point].to(columns.device)[rows, columns] for point in points]
