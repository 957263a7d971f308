"""Every hook point in one place: reading activations, adding to values, applying low-rank updates.

Nothing else in the project names a hook point or attaches a hook.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.tokens import TokenBatch

Hook = tuple[str, Callable[..., Tensor | None]]


def key_point(layer: int) -> str:
    """Hook point of the keys ``k``, the input of the MLP's down-projection: ``[text pos d_mlp]``."""
    return f"blocks.{layer}.mlp.out.hook_in"


def value_point(layer: int) -> str:
    """Hook point of the values ``v``, the output of the MLP's down-projection: ``[text pos d_model]``."""
    return f"blocks.{layer}.mlp.out.hook_out"


def pattern_point(layer: int) -> str:
    """Hook point of the attention pattern ``A``: ``[text head query key]``. To be read, not written."""
    return f"blocks.{layer}.attn.hook_pattern"


@contextmanager
def attached(model: TransformerBridge, hooks: Sequence[Hook]) -> Iterator[None]:
    """Attaches hooks, and on exit, exceptions included, removes them and no others."""
    with model.hooks(fwd_hooks=list(hooks)):
        yield


def reading(points: Sequence[str], store: dict[str, Tensor]) -> list[Hook]:
    """Hooks that put the activations at ``points`` into ``store`` on every run, gradients kept."""

    def reader(point: str) -> Hook:
        def read(activation: Tensor, hook: Any) -> None:
            store[point] = activation

        return point, read

    return [reader(point) for point in points]


def adding(layer: int, columns: Int[Tensor, " text"], vectors: Callable[[], Float[Tensor, "text d_model"]]) -> Hook:
    """A hook that adds one vector per text to the MLP output of ``layer``, at one column per text.

    ``vectors`` is called at every run, so that an optimiser may change what it returns.
    """

    def add(value: Tensor, hook: Any) -> Tensor:
        changed = value.clone()
        rows = torch.arange(len(columns), device=value.device)
        changed[rows, columns.to(value.device)] += vectors().to(value)
        return changed

    return value_point(layer), add


def updating(
    layer: int, keys: Float[Tensor, "*text rank d_mlp"], values: Float[Tensor, "*text rank d_model"]
) -> list[Hook]:
    """Hooks that make the down-projection of ``layer`` return ``v + (k @ keys.T) @ values``.

    With a leading axis, each text of the batch has an update of its own.
    """
    seen: list[Tensor] = []
    shape = "text rank" if keys.ndim == 3 else "rank"

    def read(key: Tensor, hook: Any) -> None:
        if keys.ndim == 3 and len(key) != len(keys):
            raise ValueError(f"the batch has {len(key)} texts, but updates were applied for {len(keys)}")
        seen[:] = [key]

    def write(value: Tensor, hook: Any) -> Tensor:
        dtype = torch.promote_types(value.dtype, keys.dtype)
        ks, vs = keys.to(value.device, dtype), values.to(value.device, dtype)
        match = einsum(seen.pop().to(dtype), ks, f"text pos d_mlp, {shape} d_mlp -> text pos rank")
        change = einsum(match, vs, f"text pos rank, {shape} d_model -> text pos d_model")
        return (value + change).to(value.dtype)

    return [(key_point(layer), read), (value_point(layer), write)]


def run(model: TransformerBridge, batch: TokenBatch, **options: Any) -> Float[Tensor, "text pos vocab"]:
    """Runs the model on a padded batch, mask included, and returns its logits.

    Raises:
        FloatingPointError: the logits at a real token are NaN or infinite.
    """
    logits: Tensor = model(batch.ids, attention_mask=batch.mask.long(), return_type="logits", **options)
    # The final norm and the unembedding spread whatever is not finite over the whole vocabulary.
    broken = (~torch.isfinite(logits[:, :, 0]) & batch.mask).any(1)
    if broken.any():
        raise _not_finite(model, "logits", batch.rows[int(broken.nonzero()[0, 0])].text)
    return logits


def _not_finite(model: TransformerBridge, what: str, text: str) -> FloatingPointError:
    return FloatingPointError(
        f"{model.cfg.model_name} gives {what} that are not finite on {text[:80]!r}. Likely causes: (a) a weight has "
        "NaN; (b) an edit in effect is so large that the dtype overflows; (c) left padding in float64, which Hugging "
        "Face's Llama attention turns into NaN: set model.tokenizer.padding_side = 'right'"
    )


def is_hooked(model: TransformerBridge) -> bool:
    """Whether any hook is attached, so that the model may not compute what its weights say."""
    return any(point.fwd_hooks for point in model.hook_points())


def read(
    model: TransformerBridge, batch: TokenBatch, points: Sequence[str], stop_at_layer: int | None = None
) -> dict[str, Tensor]:
    """Runs the model without gradients and returns the activations at ``points``.

    Raises:
        RuntimeError: a hook point that the model has did not fire.
        FloatingPointError: an activation is NaN or infinite.
    """
    store: dict[str, Tensor] = {}
    with torch.no_grad(), attached(model, reading(points, store)):
        model(batch.ids, attention_mask=batch.mask.long(), stop_at_layer=stop_at_layer)
    silent = [point for point in points if point not in store]
    if silent:
        raise RuntimeError(f"the hook points {silent} of {model.cfg.model_name} did not fire; cannot read them")
    for point, activation in store.items():
        finite = torch.isfinite(activation.flatten(1)).all(1)
        if not finite.all():
            raise _not_finite(model, f"activations at {point}", batch.rows[int((~finite).nonzero()[0, 0])].text)
    return store
