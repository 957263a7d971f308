"""Loading models, and what every module asks of one: its layers, its down-projection, its identity."""

import copy
import hashlib
import json
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from attn_drift.hooks import key_point, pattern_point, value_point
from attn_drift.tokens import mark_as_published, own_tokenizer

DEMO = "demo"

# Of a model's configuration, what does not change what it computes.
INCIDENTAL = {
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "dtype",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def demo_folder() -> Path:
    """The folder of the shipped demo model: weights, tokenizer and ``world.json``."""
    with as_file(files("attn_drift") / "demo" / "model") as folder:
        return folder


def load_model(
    source: str | Path | PreTrainedModel | TransformerBridge,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> TransformerBridge:
    """Loads a model as a TransformerLens bridge, weights as they are (never in compatibility mode, which folds them).

    Args:
        source: ``"demo"``; a folder in Hugging Face's layout; a name on the Hugging Face hub; a Hugging Face model
            (wrapped in place, with ``tokenizer``); or a bridge, which is checked and returned as it is.
        tokenizer: of an in-memory Hugging Face model.
        device: where the model goes; TransformerLens chooses when None.
        dtype: of the weights; when None float32, and for an in-memory model what it has.

    Raises:
        ValueError: a model that cannot be edited here; the message says what it lacks.
        OSError: no such folder, and no such name within reach; the message says what was tried.
    """
    if isinstance(source, TransformerBridge):
        if tokenizer is not None or device is not None or dtype is not None:
            raise ValueError("a bridge is taken as it is; set its tokenizer, device and dtype before, not here")
        model = source
    elif isinstance(source, PreTrainedModel):
        if tokenizer is None:
            raise ValueError("a Hugging Face model was given without its tokenizer; pass load_model(model, tokenizer)")
        if any("_original_component" in name for name, _ in source.named_parameters()):
            raise ValueError("the Hugging Face model is already wrapped in a bridge; pass that bridge")
        name = source.config.name_or_path or type(source).__name__
        dtype = source.dtype if dtype is None else dtype
        model = _boot(name, tokenizer, device, dtype, hf_model=source.to(dtype))
    else:
        model = _load_by_name(source, device, torch.float32 if dtype is None else dtype)
    check_model(model)
    return model


def _load_by_name(source: str | Path, device: str | torch.device | None, dtype: torch.dtype) -> TransformerBridge:
    name = str(source)
    folder = demo_folder() if source == DEMO else Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise OSError(f"the folder {folder} has no config.json; expected a model saved by save_pretrained")
        model = _boot(str(folder), AutoTokenizer.from_pretrained(folder), device, dtype)
        model.cfg.model_name = DEMO if source == DEMO else str(folder.absolute())
        return model
    try:
        return _boot(name, AutoTokenizer.from_pretrained(name), device, dtype)
    except (OSError, ValueError) as error:
        raise OSError(
            f"cannot load the model {name!r}: it is not {DEMO!r}, there is no folder {folder.absolute()}, and the "
            f"Hugging Face hub and its local cache gave no such model ({type(error).__name__}: "
            f"{str(error)[:200]}). Check the name, download the model where there is a network, or "
            "give a folder."
        ) from error


def _boot(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    device: str | torch.device | None,
    dtype: torch.dtype,
    hf_model: PreTrainedModel | None = None,
) -> TransformerBridge:
    # TransformerLens would load the tokenizer anew so that it adds BOS; one that says it does already is left alone.
    tokenizer = copy.deepcopy(tokenizer)
    init_kwargs = tokenizer.init_kwargs
    tokenizer.init_kwargs = {"name_or_path": name, **init_kwargs, "add_bos_token": True}
    model = TransformerBridge.boot_transformers(
        name, hf_model=hf_model, tokenizer=tokenizer, device=None if device is None else str(device), dtype=dtype
    )
    model.tokenizer.init_kwargs = init_kwargs
    mark_as_published(model.tokenizer)
    return model.eval()


def check_model(model: TransformerBridge) -> None:
    """Raises a ValueError when the model lacks something that editing or capturing needs, or is in training mode."""
    if model.original_model.training:
        raise ValueError("the model is in training mode, where dropout changes every run; call model.eval()")
    if getattr(model, "compatibility_mode", False):
        raise ValueError(
            "the model is in TransformerLens's compatibility mode, which folds and centres weights, so that an edit "
            "would not be one of the original model; load it again without enable_compatibility_mode()"
        )
    if model.tokenizer is None or not getattr(model.tokenizer, "is_fast", False):
        raise ValueError(
            f"the model's tokenizer ({type(model.tokenizer).__name__}) gives no character offsets; load the model "
            "with a fast tokenizer"
        )
    points = model.hook_dict
    for layer in range(model.cfg.n_layers):
        for point in (key_point(layer), value_point(layer), pattern_point(layer)):
            if point not in points:
                raise ValueError(
                    f"{model.cfg.model_name} has no {point}: only models with attention and a dense "
                    "MLP in every layer can be edited here"
                )


def check_layer(model: TransformerBridge, layer: int) -> None:
    """Raises a ValueError for a layer that the model does not have."""
    if not 0 <= layer < model.cfg.n_layers:
        raise ValueError(
            f"layer {layer} is out of range: {model.cfg.model_name} has the layers 0 to {model.cfg.n_layers - 1}"
        )


def check_finite(model: TransformerBridge) -> None:
    """Raises a ValueError naming the first weight that has a NaN or an infinity."""
    for name, weight in model.original_model.state_dict().items():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            clean = name.replace("._original_component", "")
            raise ValueError(f"the weight {clean} of {model.cfg.model_name} has NaN or infinite entries; reload it")


def down_projection(model: TransformerBridge, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """The weight that maps keys to values, ``v = k @ W``: the model's own storage, so that in-place changes count."""
    check_layer(model, layer)
    weight: Tensor = model.blocks[layer].mlp.W_out
    return weight


def mlp_width(model: TransformerBridge, layer: int) -> int:
    """``d_mlp`` of a layer, read from its weight."""
    return int(down_projection(model, layer).shape[0])


def float64_device(model: TransformerBridge) -> torch.device:
    """Where to solve in float64: the model's device, or the CPU where that is MPS, which has no float64."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "mps" else device


def fingerprint(model: TransformerBridge) -> str:
    """A hash of the configuration and the weights: names, shapes, dtypes, and some 4,096 evenly spaced entries of each.

    Files that belong to a model (edits, second moments, sampled contexts) carry it. A dense change of any weight,
    such as an edit, changes it.
    """
    config = {k: v for k, v in model.original_model.config.to_dict().items() if k not in INCIDENTAL and v is not None}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.original_model.state_dict().items()):
        clean = name.replace("._original_component", "")
        flat = weight.detach().flatten()
        # Not a multiple of a row's length, so that the entries spread over rows and columns.
        sample = flat[:: max(1, flat.numel() // 4096) | 1]
        digest.update(f"{clean}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(sample.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def origin(model: TransformerBridge) -> dict[str, str]:
    """All of a model that text sampled from it depends on: weights, tokenizer, kind of device, and libraries."""
    tokenizer = own_tokenizer(model)
    # Padding and truncation are set by the last call, and are not used here.
    rules = {
        k: v for k, v in json.loads(tokenizer.backend_tokenizer.to_str()).items() if k not in ("padding", "truncation")
    }
    return {
        "model": fingerprint(model),
        "tokenizer": hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest(),
        "ends": f"{tokenizer.bos_token_id} {tokenizer.eos_token_id}",
        "device": next(model.parameters()).device.type,
        "torch": torch.__version__,
        "transformer-lens": version("transformer-lens"),
    }
