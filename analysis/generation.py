"""Free continuations of texts, each under an edit of its own: greedy, or sampled from seeds of their own.

Rows share batches, but what one gets does not depend on the others: randomness comes from a seed per row.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from attn_drift.edits import Edit, applied_to_rows
from attn_drift.tokens import Tokens, own_tokenizer, pad

ROWS_AT_ONCE = 256
# Numbers in the KV cache of the rows that are continued at once.
CACHED_AT_ONCE = 2**30
TOP_K = 5


@dataclass(frozen=True, eq=False)
class Opening:
    """A text to be continued.

    Attributes:
        edit: in effect (None: the model as it is).
        tokens: the text.
        length: of the continuation, in tokens.
        seed: of the sampling; None for the first choice at every step.
    """

    edit: Edit | None
    tokens: Tokens
    length: int
    seed: int | None = None


def continuations(model: TransformerBridge, openings: Sequence[Opening]) -> list[str]:
    """The model's own continuations, of ``length`` tokens each.

    End tokens do not stop them and are left out; no word goes on across one.

    Sampling is from the 5 most probable tokens, as in the paper's fluency.

    Raises:
        ValueError: a text that does not fit the model's context together with its continuation.
        FloatingPointError: the model gives logits that are not finite.
    """
    for opening in openings:
        check_room(model, opening.tokens, opening.length)
    texts: dict[int, str] = {}
    tokenizer = own_tokenizer(model)
    with tqdm(total=len(openings), desc="continuing texts", leave=False) as progress:
        for group in _groups(model, openings):
            rows = [openings[i] for i in group]
            generated = _generate(model, rows)
            for i, row, ids in zip(group, rows, generated.tolist(), strict=True):
                texts[i] = _text(tokenizer, ids[: row.length])
            progress.update(len(group))
    return [texts[i] for i in range(len(openings))]


def check_room(model: TransformerBridge, tokens: Tokens, length: int) -> None:
    """Raises a ValueError for a text that does not fit the model's context together with its continuation."""
    if len(tokens) + length > model.cfg.n_ctx:
        raise ValueError(
            f"the text has {len(tokens)} tokens and is to be continued by {length}, together more than the model's "
            f"context of {model.cfg.n_ctx}; shorten it: {tokens.text[:60]!r}"
        )


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    special = set(tokenizer.all_special_ids)
    parts = [list(part) for left_out, part in groupby(ids, special.__contains__) if not left_out]
    return " ".join(tokenizer.decode(part, skip_special_tokens=True) for part in parts)


def _groups(model: TransformerBridge, openings: Sequence[Opening]) -> Iterator[list[int]]:
    """Indices in batches of like length that fit the context together, sampled and greedy ones apart."""
    # Hugging Face's Llama attention turns padding in float64 into NaN.
    padded = next(model.parameters()).dtype != torch.float64
    order = sorted(
        range(len(openings)), key=lambda i: (openings[i].seed is None, openings[i].length, len(openings[i].tokens))
    )
    per_token = 2 * model.cfg.n_layers * model.cfg.d_model
    group: list[int] = []
    for i in order:
        first = openings[group[0]] if group else openings[i]
        other_kind = (openings[i].seed is None) != (first.seed is None)
        other_length = openings[i].length > 2 * first.length
        # All rows are continued by as many tokens as the longest continuation has.
        longest = max(len(openings[j].tokens) for j in (*group, i))
        width = longest + openings[i].length
        full = len(group) == ROWS_AT_ONCE or (len(group) + 1) * width * per_token > CACHED_AT_ONCE
        too_long = width > model.cfg.n_ctx
        uneven = not padded and len(openings[i].tokens) != len(first.tokens)
        if group and (full or other_kind or other_length or too_long or uneven):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


class _Choice(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token: the first choice, or, by the Gumbel-max trick, a sample of the most probable ones."""

    def __init__(self, model_name: str, noise: Float[Tensor, "text step rank"] | None) -> None:
        self.model_name, self.noise, self.step = model_name, noise, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not torch.isfinite(scores[:, 0]).all():
            raise FloatingPointError(
                f"{self.model_name} gives logits that are not finite while continuing a text: a weight has NaN, or an "
                "edit in effect is so large that the dtype overflows"
            )
        if self.noise is None:
            return scores
        top = scores.topk(self.noise.shape[2], dim=1)
        chosen = (top.values + self.noise[:, self.step].to(top.values)).argmax(1, keepdim=True)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, top.indices.gather(1, chosen), 0.0)


def _generate(model: TransformerBridge, rows: Sequence[Opening]) -> Int[Tensor, "text new"]:
    hf = model.original_model
    batch = pad(model, [row.tokens for row in rows], side="left")
    choice = _Choice(model.cfg.model_name, _noise(rows))
    with torch.no_grad(), _plain_generation(model), applied_to_rows(model, [row.edit for row in rows]):
        ids: Tensor = hf.generate(
            input_ids=batch.ids,
            attention_mask=batch.mask.long(),
            max_new_tokens=max(row.length for row in rows),
            do_sample=False,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([choice]),
        )
    return ids[:, batch.ids.shape[1] :]


@contextmanager
def _plain_generation(model: TransformerBridge) -> Iterator[None]:
    """A block in which nothing of the checkpoint's own generation settings (penalties, end tokens) takes part."""
    hf = model.original_model
    own, hf.generation_config = hf.generation_config, GenerationConfig()
    try:
        yield
    finally:
        hf.generation_config = own


def _noise(rows: Sequence[Opening]) -> Float[Tensor, "text step rank"] | None:
    """Gumbel noise for every row, step and rank, from the rows' own seeds; None for greedy rows."""
    seeds = [row.seed for row in rows if row.seed is not None]
    if not seeds:
        return None
    steps = max(row.length for row in rows)
    draws = []
    for seed in seeds:
        uniform = torch.rand(steps, TOP_K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        draws.append(-torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12))))
    return torch.stack(draws)
