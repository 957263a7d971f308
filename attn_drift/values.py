"""Values for many requests at once, in groups that fit into memory: what all locate-then-edit editors share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.optimiser import Optimisation, OptimisedValue, ValueConfig, WitnessedOptimisation, Writing
from attn_drift.passes import Update, Witness
from attn_drift.restriction import LossTerm
from attn_drift.rewriting import RequestTexts

# Logits of one step, in numbers: requests are optimised in groups that stay below it (one at least).
LOGITS_AT_ONCE = 2**27


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
            if writing is None or restriction is None:
                optimisation = Optimisation(model, points, group, config, restriction, whole)
            else:
                witness = Witness(model, group, restriction)
                optimisation = WitnessedOptimisation(model, points, group, config, None, whole).by(witness, writing)
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
