"""Texts sampled from the model itself: the contexts of an edit, and the text of a second moment."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.changes import exclusive
from attn_drift.files import cache_path, keeping, replacing
from attn_drift.hooks import is_hooked
from attn_drift.models import origin
from attn_drift.requests import SLOT
from attn_drift.tokens import Tokens, encode, own_tokenizer

log = logging.getLogger(__name__)

# First words of ROME's context templates.
STARTS = ("The", "Therefore", "Because", "I", "You")
TOP_K = 5

# Of ROME's templates: lengths in tokens, and how many of each with each first word.
ROME_LENGTHS = ((5, 2), (10, 2))

SEQUENCES_AT_ONCE = 256


@exclusive
def sample_contexts(
    model: TransformerBridge,
    generator: torch.Generator | None = None,
    lengths: tuple[tuple[int, int], ...] = ROME_LENGTHS,
) -> list[str]:
    """Contexts for an edit: the empty one, and short texts of the model's own, each ended with ``". "``.

    Started from ``STARTS`` and sampled with top-k 5 (method.md, section 2); cached, keyed by all that they depend on,
    but not where hooks are attached (an edit in effect).

    Args:
        model: the model.
        generator: a seed is drawn from it; 0 when None.
        lengths: pairs of a length in tokens and how many texts of it there are for each of the five first words:
            ROME's ten of 5 and ten of 10 tokens by default.
    """
    # Drawn whether or not the cache will be hit, so that a cache does not change the generator's state.
    seed = 0 if generator is None else int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    if is_hooked(model):
        return _sample_contexts(model, seed, lengths)
    key = {**origin(model), "seed": seed, "starts": STARTS, "lengths": lengths, "top_k": TOP_K}
    path = cache_path("contexts", ".json", key)
    if path.is_file():
        try:
            return [str(context) for context in json.loads(path.read_text(encoding="utf-8"))]
        except ValueError:
            log.warning("the cached contexts %s are damaged; they are made anew", path)
    contexts = _sample_contexts(model, seed, lengths)
    with keeping(), replacing(path) as temporary:
        temporary.write_text(json.dumps(contexts), encoding="utf-8")
    return contexts


def _sample_contexts(model: TransformerBridge, seed: int, lengths: tuple[tuple[int, int], ...]) -> list[str]:
    contexts = [SLOT]
    with _seeded(seed):
        for length, repeats in lengths:
            for start in STARTS:
                prompt = torch.tensor([encode(model, start).ids] * repeats)
                sampled = _generate(model, prompt, max(1, length - prompt.shape[1]), top_k=TOP_K)
                contexts += [f"{_clean(text)}. {SLOT}" for text in _decode(model, sampled)]
    return contexts


@exclusive
def sample_documents(model: TransformerBridge, n_tokens: int, length: int, seed: int) -> list[Tokens]:
    """About ``n_tokens`` tokens of the model's own text, in sequences of ``length`` tokens started from its BOS or EOS.

    The sequences are kept as they were sampled: tokenizing their text again could give other tokens.

    Raises:
        ValueError: the tokenizer has neither token to start from.
    """
    tokenizer = own_tokenizer(model)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError(
            "the tokenizer has neither a BOS nor an EOS token to sample the model's own text from; hand in "
            "moment=second_moment(model, layer, texts)"
        )
    n_texts = -(-n_tokens // length)
    documents: list[Tokens] = []
    with _seeded(seed), tqdm(total=n_texts, desc="sampling the model's own text", leave=False) as progress:
        while len(documents) < n_texts:
            prompt = torch.full((min(SEQUENCES_AT_ONCE, n_texts - len(documents)), 1), start)
            sampled = _generate(model, prompt, length - 1)
            for ids, text in zip(sampled.tolist(), _decode(model, sampled), strict=True):
                documents.append(Tokens(text, tuple(ids), ((0, 0),) * len(ids)))
            progress.update(len(prompt))
    return documents


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A block with a random state of its own: generation only draws from the global one."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _generate(
    model: TransformerBridge, prompt: Int[Tensor, "text pos"], new: int, top_k: int | None = None
) -> Int[Tensor, "text longer"]:
    """Continues token prompts by sampling at temperature 1; end tokens do not stop it."""
    device = next(model.parameters()).device
    generated: Tensor = model.generate(
        prompt.to(device),
        max_new_tokens=new,
        do_sample=True,
        top_k=top_k,
        stop_at_eos=False,
        prepend_bos=False,
        return_type="tokens",
        verbose=False,
    )
    return generated


def _decode(model: TransformerBridge, ids: Int[Tensor, "text pos"]) -> list[str]:
    texts: list[str] = own_tokenizer(model).batch_decode(ids, skip_special_tokens=True)
    return texts


def _clean(text: str) -> str:
    """One line without braces, which would look like the prompt's place, and without a full stop of its own."""
    return " ".join(text.replace("{", " ").replace("}", " ").split()).rstrip(".")
