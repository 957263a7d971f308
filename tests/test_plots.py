"""Live figures hold what was given: values, symmetric colours, labels of repeated tokens."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from test_edits import random_edit
from transformer_lens.model_bridge import TransformerBridge

import attn_drift as ad
from analysis import plots
from analysis.drift import attention_drift, subject_attention

Make = Callable[..., TransformerBridge]
TEXTS = ["Ada Bellini plays the <b>cello</b> the the", "The man met Ada Bellini"]


@pytest.fixture
def captures(small: TransformerBridge) -> list[ad.AttentionCapture]:
    before = ad.capture_attention(small, TEXTS)
    with random_edit(small, 0, (0,)).applied(small):
        return [before, ad.capture_attention(small, TEXTS)]


def test_drift_heatmap(captures: list[ad.AttentionCapture]) -> None:
    drift = attention_drift(*captures, "Ada Bellini")
    figure = plots.drift_heatmap({"a": drift, "b<": drift})
    assert len(figure.data) == 2 and [a.text for a in figure.layout.annotations] == ["a", "b&lt;"]
    colours, trace = figure.layout.coloraxis, figure.data[1]
    np.testing.assert_allclose(trace.z, drift.subject_last.mean(0).numpy(), rtol=1e-5, atol=1e-8)
    assert colours.cmid == 0 and colours.cmin == -colours.cmax == -np.abs(trace.z).max()
    assert list(trace.x) == [0, 1, 2, 3] and list(trace.y) == [0, 1, 2]
    kl = plots.drift_heatmap(drift, "row_kl").data[0]
    np.testing.assert_allclose(kl.z, drift.row_kl.mean(0).numpy(), rtol=1e-5, atol=1e-8)
    with pytest.raises(ValueError, match="the measure is 'kl'"):
        plots.drift_heatmap(drift, "kl")


def test_heatmap_of_no_drift(captures: list[ad.AttentionCapture]) -> None:
    figure = plots.drift_heatmap(attention_drift(captures[0], captures[0], "Ada Bellini"))
    assert not np.any(figure.data[0].z) and figure.layout.coloraxis.cmax == 1


def test_attention_rows(captures: list[ad.AttentionCapture]) -> None:
    figure = plots.attention_rows(*captures, captures[0], head=2)
    assert [a.text for a in figure.layout.annotations] == ["before", "after", "restricted"]
    assert len(figure.data) == 3 and figure.layout.coloraxis.cmin == 0 and figure.layout.coloraxis.cmax == 1
    n = len(captures[0].tokens[0])
    for trace, capture in zip(figure.data, [*captures, captures[0]], strict=True):
        np.testing.assert_allclose(trace.z, capture.patterns[0][:, 2, -1].numpy())
        assert list(trace.x) == list(range(n))  # repeated tokens stay apart
    labels = figure.layout.xaxis.ticktext
    assert len(labels) == n and labels.count("·the") + labels.count("the") >= 3
    assert not any("<" in label for label in labels)
    whole = plots.attention_rows(captures[0]).data[0].z
    np.testing.assert_allclose(whole, captures[0].patterns[0][:, :, -1].amax(1).numpy())


def test_one_token(small: TransformerBridge) -> None:
    capture = ad.capture_attention(small, "I")
    assert np.shape(plots.attention_rows(capture).data[0].z) == (3, 1)


def test_attention_rows_refuses(captures: list[ad.AttentionCapture], small: TransformerBridge) -> None:
    with pytest.raises(ValueError, match="there is no text 2"):
        plots.attention_rows(*captures, text=2)
    with pytest.raises(ValueError, match="there is no head 4"):
        plots.attention_rows(*captures, head=4)
    with pytest.raises(ValueError, match="differ in texts or layers"):
        plots.attention_rows(captures[0], ad.capture_attention(small, TEXTS[1]))
    with pytest.raises(ValueError, match="a name for each"):
        plots.attention_rows()


def test_layer_maximum(captures: list[ad.AttentionCapture]) -> None:
    attention = {name: subject_attention(c, "Ada Bellini") for name, c in zip(("none", "a<b"), captures, strict=True)}
    figure = plots.layer_maximum(attention)
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert [trace.name for trace in lines] == ["none", "a&lt;b"]
    for trace, values in zip(lines, attention.values(), strict=True):
        np.testing.assert_allclose(trace.y, values.last.amax(-1).mean(0).numpy(), rtol=1e-6)


def test_loss_history(make_model: Make) -> None:
    terms = torch.arange(12, dtype=torch.float32).view(2, 6)
    history = ad.EditHistory(terms)
    figure = plots.loss_history({"one": history, "two": history})
    assert len(figure.data) == 12
    assert [list(trace.y) for trace in figure.data[:6]] == terms.T.tolist()
    assert len(plots.loss_history(history).data) == 6


def test_gamma_tradeoff() -> None:
    frame = pd.DataFrame(
        {
            "editor": ["a", "a", "b"],
            "gamma": [0.1, 0.0, 0.1],
            "PS": [0.8, 0.9, 0.7],
            "DNS": [0.9, 0.5, 0.95],
            "PS_low": [0.7, 0.8, 0.6],
            "PS_high": [0.85, 0.95, 0.75],
        }
    )
    figure = plots.gamma_tradeoff(frame)
    assert [trace.name for trace in figure.data] == ["a", "b"]
    assert list(figure.data[0].text) == ["0", "0.1"] and list(figure.data[0].y) == [0.9, 0.8]
    np.testing.assert_allclose(figure.data[0].error_y.array, [0.05, 0.05])
    assert figure.data[0].error_x.array is None
    with pytest.raises(ValueError, match="lacks the columns"):
        plots.gamma_tradeoff(frame.drop(columns="gamma"))
