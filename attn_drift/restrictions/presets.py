"""SADR's weight for an editor and a model: a preset, or a weak default."""

from transformer_lens.model_bridge import TransformerBridge

from attn_drift.presets import load_gamma, warn_once

# SADR's published weight on GPT-J, and the heads that it held there: those above the (last) edited layer. None is
# published for AlphaEdit, which optimizes as MEMIT does.
PUBLISHED_GAMMAS = {
    "rome": (0.01, 22 * 16),
    "memit": (0.005, 19 * 16),
    "pmet": (0.08, 19 * 16),
    "alphaedit": (0.005, 19 * 16),
}


def preset_gamma(editor: str, model: TransformerBridge, layer: int) -> float:
    """SADR's weight above a layer: the preset's, or a weak default, which the log says once.

    L_SADR sums over restricted layers and heads. At another layer of a model with a preset, gamma x heads is kept. A
    model without one gets the published weight, and less where it has more heads than GPT-J: never more, since too
    strong a weight undoes the edit's paraphrases. It may be too weak to help: on the demo 0.005 does nothing.
    """
    preset, heads = load_gamma(editor, model), _heads_above(model, layer)
    if preset is not None:
        own, gamma = preset
        if own == layer:
            return gamma
        gamma *= _heads_above(model, own) / heads
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
