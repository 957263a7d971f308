"""Settings for published models, by editor and model name: data in ``attn_drift/presets``."""

import json
import logging
from collections.abc import Mapping
from importlib.resources import files
from typing import Any
from weakref import WeakKeyDictionary

from transformer_lens.model_bridge import TransformerBridge

from attn_drift.bridges import check_bridge
from attn_drift.models import DEMO

log = logging.getLogger(__name__)

# SADR's published weight on GPT-J, and the heads that it held there: those above the (last) edited layer. None is
# published for AlphaEdit, which optimizes as MEMIT does.
PUBLISHED_GAMMAS = {
    "rome": (0.01, 22 * 16),
    "memit": (0.005, 19 * 16),
    "pmet": (0.08, 19 * 16),
    "alphaedit": (0.005, 19 * 16),
}


# What was said of each model.
_said: WeakKeyDictionary[TransformerBridge, set[str]] = WeakKeyDictionary()


def warn_once(model: TransformerBridge, message: str, *values: object) -> None:
    """Logs a warning, unless the same was said of this model before."""
    said = _said.setdefault(model, set())
    if (text := message % values) not in said:
        said.add(text)
        log.warning("%s", text)


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


def settings_for(editor: str, model: TransformerBridge) -> dict[str, Any]:
    """The fields of an editor's settings that the preset of a model has; none where there is no preset."""
    return {name: value for name, value in (preset(editor, model) or {}).items() if name != "gamma"}


def last_layer(settings: Mapping[str, Any]) -> int:
    """The last edited layer of a preset."""
    return int(settings["layer"] if "layer" in settings else max(settings["layers"]))


def _tuples(value: Any) -> Any:
    """Lists as tuples, as frozen settings have them."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def preset_gamma(editor: str, model: TransformerBridge, layer: int) -> float:
    """SADR's weight for an editor and model: the preset, or, said in the log once, a weak default.

    L_SADR sums over restricted layers and heads. At another layer of a model with a preset, gamma x heads is kept. A
    model without one gets the published weight, and less where it has more heads than GPT-J: never more, since too
    strong a weight undoes the edit's paraphrases (docs/results), while a weak one still helps.
    """
    settings = preset(editor, model)
    heads = _heads_above(model, layer)
    if settings is not None and "gamma" in settings:
        own = last_layer(settings)
        if own == layer:
            return float(settings["gamma"])
        gamma = settings["gamma"] * _heads_above(model, own) / heads
        why = f"its product with the {heads} heads above is that of layer {own}"
    else:
        published, published_heads = PUBLISHED_GAMMAS[editor]
        gamma = published * min(1, published_heads / heads)
        why = f"a weak default, at most the published {published:g}: raise it while paraphrases (PS) hold"
    gamma = float(f"{gamma:.2g}")
    warn_once(
        model,
        "%s has no preset weight of SADR for %s at layer %d: gamma is %g, %s; give gamma= to choose another",
        model.cfg.model_name,
        editor,
        layer,
        gamma,
        why,
    )
    return gamma


def _heads_above(model: TransformerBridge, layer: int) -> int:
    return int(max(1, model.cfg.n_layers - 1 - layer) * model.cfg.n_heads)
