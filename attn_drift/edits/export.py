"""An edited model as a plain Hugging Face folder, which loads without this project."""

import copy
import os
from pathlib import Path

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from attn_drift.edits.edit import Edit, compose, written_in
from attn_drift.edits.low_rank import check_finite_sum, identities
from attn_drift.files import replacing
from attn_drift.model.bridge import check_bridge
from attn_drift.model.changes import exclusive
from attn_drift.model.loading import check_model, down_projection
from attn_drift.model.tokens import own_tokenizer


@exclusive
def export(model: TransformerBridge, edit: Edit | None, folder: str | Path) -> None:
    """Writes the model with an edit in its weights: configuration, weights (safetensors) and tokenizer.

    The folder appears whole or not at all, and the model itself is never changed. Weights have the dtype that they
    have in the model, which for a model from `load_model` is float32 unless another was asked for.

    Args:
        model: the model, with whatever edits are written in it.
        edit: goes into the exported weights, but for what of it is written in the model already; None for no more.
        folder: where; it must not exist, or be empty.

    Raises:
        FileExistsError: there is a file, or a folder with something in it.
        ValueError: an argument of another kind, an edit that does not fit the model or would take a weight beyond its
            dtype, or a model that cannot be edited here.
        RuntimeError: another thread is using the model.
    """
    _check_kinds(model, edit, folder)
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} is there already; export needs a new or empty folder: give another, or empty it"
        )
    check_model(model)
    skeleton = _skeleton(model)
    weights = _weights(model, skeleton)
    if edit is not None:
        edit.check_fits(model)
        edit.warn_of_another_model(model, identities(model))
        there = written_in(model)
        if more := [leaf for leaf in edit.leaves() if leaf not in there]:
            weights |= _edited(model, compose(more), weights)
    with replacing(folder) as temporary:
        skeleton.save_pretrained(temporary, state_dict=weights)
        own_tokenizer(model).save_pretrained(temporary)


def _check_kinds(model: object, edit: object, folder: object) -> None:
    """Raises a ValueError for arguments in another order, or of another kind."""
    if isinstance(edit, Edit | None) and isinstance(folder, str | os.PathLike):
        check_bridge(model)
    if not (
        isinstance(model, TransformerBridge) and isinstance(edit, Edit | None) and isinstance(folder, str | os.PathLike)
    ):
        given = ", ".join(type(argument).__name__ for argument in (model, edit, folder))
        raise ValueError(
            f"export was given ({given}); expected a model from load_model, an Edit or None, and a folder's path, in "
            "this order: export(model, edit, 'folder')"
        )


def _skeleton(model: TransformerBridge) -> PreTrainedModel:
    """The Hugging Face model without TransformerLens's modules in it, and without weights."""
    hf = model.original_model
    with torch.device("meta"):
        skeleton: PreTrainedModel = type(hf)(copy.deepcopy(hf.config)).to(hf.dtype)
    skeleton.generation_config = copy.deepcopy(hf.generation_config)
    return skeleton


def _weights(model: TransformerBridge, skeleton: PreTrainedModel) -> dict[str, Tensor]:
    """The model's own tensors under Hugging Face's names; TransformerLens adds names for the same and for copies."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.original_model.state_dict().items():
        found.setdefault(name.replace("._original_component", ""), tensor)
    expected = skeleton.state_dict()
    for name, tensor in expected.items():
        if name not in found or found[name].shape != tensor.shape:
            raise ValueError(
                f"{model.cfg.model_name} cannot be exported: its weight {name} is not in the bridge with the shape "
                f"{list(tensor.shape)}; load the model anew"
            )
    return {name: found[name] for name in expected}


def _edited(model: TransformerBridge, edit: Edit, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the down-projections that the edit changes, with the change, under their names in ``weights``."""
    edited = {}
    for layer, update in edit.updates.items():
        projection = down_projection(model, layer).detach()
        names = [name for name, tensor in weights.items() if tensor.data_ptr() == projection.data_ptr()]
        if len(names) != 1:
            raise ValueError(
                f"the down-projection of layer {layer} is the weights {names} of {model.cfg.model_name}; expected one"
            )
        # By strides, since shapes do not tell [d_mlp d_model] from its transpose where the two widths are equal.
        transposed = weights[names[0]].stride() != projection.stride()
        weight = update.added_to(projection)
        check_finite_sum(weight, projection, [update], layer)
        edited[names[0]] = weight.T.contiguous() if transposed else weight
    return edited
