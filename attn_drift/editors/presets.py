"""Settings for published models, by editor and model name: data in ``attn_drift/presets``."""

import json
import logging
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from attn_drift.models import DEMO, check_bridge

log = logging.getLogger(__name__)

# gamma x restricted heads of the published settings on GPT-J: 0.01 on the 22 x 16 heads above ROME's layer, 0.005 and
# 0.08 on the 19 x 16 above MEMIT's and PMET's last; AlphaEdit, for which none is published, as MEMIT.
GAMMA_TIMES_HEADS = {"rome": 3.5, "memit": 1.5, "pmet": 24.0, "alphaedit": 1.5}


def preset(editor: str, model: TransformerBridge) -> dict[str, Any] | None:
    """The settings of an editor for a model, found by the last part of the model's name; None where there are none.

    Beside fields of the editor's settings they may have ``gamma``, SADR's weight.
    """
    check_bridge(model)
    presets = json.loads((files("attn_drift") / "presets" / f"{editor}.json").read_text(encoding="utf-8"))
    name = str(model.cfg.model_name)
    key = name.rstrip("/").split("/")[-1].lower()
    found: dict[str, Any] | None = presets.get(key)
    # A folder may be called as the demo model is.
    if found is None or last_layer(found) >= model.cfg.n_layers or (key == DEMO and name != DEMO):
        return None
    return {name: _tuples(value) for name, value in found.items()}


def last_layer(settings: Mapping[str, Any]) -> int:
    """The last edited layer of a preset."""
    return int(settings["layer"] if "layer" in settings else max(settings["layers"]))


def _tuples(value: Any) -> Any:
    """Lists as tuples, as frozen settings have them."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def preset_gamma(editor: str, model: TransformerBridge, layer: int) -> float:
    """SADR's weight for an editor and model: the preset, or, said in the log, one that scales with the heads held.

    L_SADR sums over restricted layers and heads, so that a weight transfers to another model as its product with them.
    """
    settings = preset(editor, model)
    heads = _heads_above(model, layer)
    if settings is not None and "gamma" in settings:
        own = last_layer(settings)
        if own == layer:
            return float(settings["gamma"])
        product, why = settings["gamma"] * _heads_above(model, own), f"that of layer {own}"
    else:
        product, why = GAMMA_TIMES_HEADS[editor], "that of the published setting"
    gamma = float(f"{product / heads:.2g}")
    log.warning(
        "%s has no preset weight of SADR for %s at layer %d: gamma %g was chosen so that its product with the %d heads "
        "above is %s; give gamma= to choose another",
        model.cfg.model_name,
        editor,
        layer,
        gamma,
        heads,
        why,
    )
    return gamma


def _heads_above(model: TransformerBridge, layer: int) -> int:
    return int(max(1, model.cfg.n_layers - 1 - layer) * model.cfg.n_heads)
