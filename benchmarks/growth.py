"""How the time of a SADR step grows: with requests, tokens after the subject, context length, layers and width."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from transformers import GPT2Config, GPT2LMHeadModel
from workloads import SADR, Lab

import attn_drift as ad
from analysis.plots.style import COLORS, TEMPLATE
from attn_drift.model.tokens import encode
from attn_drift.prompts import RequestPrompts, request_prompts

STEPS = 6
ROUNDS = 5
REQUESTS = (1, 2, 4, 8, 16, 32, 64)
# Whole texts at every step, up to as many requests: their time per edit does not fall further.
WHOLE_UP_TO = 8
SUFFIX = (4, 8, 16, 32, 48, 64)
CONTEXT = (5, 10, 20, 40, 80, 160)
LAYERS = (3, 6, 12, 24)
WIDTH = (64, 128, 256, 512)

WORD = " is"  # one token of the demo model


def growth(lab: Lab) -> Iterator[tuple[str, int, str, float]]:
    """Rows of what grows, its size, the path, and seconds per step and edit; paths take turns."""
    for n in REQUESTS:
        yield from _both(lab, "requests", n, lab.texts(n), ("fast", "plain") if n <= WHOLE_UP_TO else ("fast",))
    for n in SUFFIX:
        yield from _both(lab, "tokens from the subject on", n, [_long_suffix(lab, n)])
    for n in CONTEXT:
        yield from _both(lab, "tokens of context", n, [_long_context(lab, n)])
    for n in LAYERS:
        yield from _of_model(lab, "layers", n, n, 128)
    for n in WIDTH:
        yield from _of_model(lab, "width", n, 6, n)


def _both(
    lab: Lab, what: str, size: int, texts: Sequence[RequestPrompts], paths: Sequence[str] = ("fast", "plain")
) -> Iterator[tuple[str, int, str, float]]:
    for _ in range(ROUNDS):
        for path in paths:
            yield what, size, path, lab.step(texts, SADR, STEPS, path == "plain")


def _long_suffix(lab: Lab, n: int) -> RequestPrompts:
    """The first request, its prompt filled up to ``n`` tokens from the subject-last one on."""
    request = lab.cases[0].request
    short = request_prompts(lab.model, request, lab.contexts).rewriting[0]
    missing = n - (len(short.completion.tokens) - short.subject_last)
    assert missing >= 0
    return request_prompts(lab.model, replace(request, prompt=request.prompt + missing * WORD), lab.contexts)


def _long_context(lab: Lab, n: int) -> RequestPrompts:
    """The first request behind contexts of ``n`` tokens, and by itself."""
    context = "The" + (n - 2) * WORD + "."
    assert len(encode(lab.model, context)) == n
    return request_prompts(lab.model, lab.cases[0].request, ["{}", *20 * [context + " {}"]])


def _of_model(lab: Lab, what: str, size: int, layers: int, width: int) -> Iterator[tuple[str, int, str, float]]:
    """On a random model, edited at a third of its depth."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = {"vocab_size": lab.model.cfg.d_vocab, "bos_token_id": 0, "eos_token_id": 0}
        config = GPT2Config(n_layer=layers, n_embd=width, n_head=8, n_positions=512, **tokens)
        config._attn_implementation = "eager"
        hf = GPT2LMHeadModel(config).eval()
    model = ad.load_model(hf, lab.model.tokenizer, device="cpu")
    other = replace(lab, model=model, config=replace(lab.config, layer=layers // 3))
    yield from _both(other, what, size, other.texts(1))


def figure(rows: pd.DataFrame) -> go.Figure:
    """A panel for everything that grows: median times, bars between quartiles; tokens on linear axes.

    Args:
        rows: of `growth`, with the columns what, size, path and seconds.
    """
    grouped = (1000 * rows.set_index(["what", "size", "path"])["seconds"]).groupby(level=[0, 1, 2], sort=False)
    typical = grouped.describe().reset_index().sort_values("size")
    panels = list(rows["what"].unique())
    drawn = make_subplots(rows=1, cols=len(panels), subplot_titles=panels)
    for column, what in enumerate(panels, start=1):
        for path, color in zip(("fast", "plain"), COLORS[2:0:-1], strict=True):
            own = typical[(typical["what"] == what) & (typical["path"] == path)]
            named = {"name": path, "legendgroup": path, "showlegend": column == 1}
            shown = {"mode": "lines+markers", "line": {"color": color}}
            bars = {"array": own["75%"] - own["50%"], "arrayminus": own["50%"] - own["25%"], "width": 2}
            middle = {"x": own["size"], "y": own["50%"], "error_y": bars}
            drawn.add_scatter(**middle, row=1, col=column, **named, **shown)
        sizes = typical.loc[typical["what"] == what, "size"].unique()
        if what.startswith("tokens"):
            drawn.update_xaxes(rangemode="tozero", row=1, col=column)
        else:
            drawn.update_xaxes(type="log", tickvals=sizes, ticktext=sizes.astype(str), row=1, col=column)
    drawn.update_yaxes(rangemode="tozero")
    drawn.update_yaxes(title_text="ms per step and edit", row=1, col=1)
    drawn.update_layout(
        title="Time of a SADR step: the fast path, and whole texts at every step", template=TEMPLATE, height=380
    )
    return drawn
