"""Figures of heads and layers: what they show is what they were given."""

import pandas as pd
import pytest

from analysis import plots

LINES = pd.DataFrame(
    [
        {"panel": panel, "line": line, "layer": layer, "mean": 0.1 * layer + 0.01 * i, "low": 0.0, "high": 1.0}
        for panel in ("DNS", "RS")
        for i, line in enumerate(("a<b", "b"))
        for layer in (2, 0, 1)
    ]
)
HEADS = pd.DataFrame(
    [
        {"panel": panel, "layer": layer, "head": head, "value": sign * (layer + head / 10)}
        for panel, sign in (("x", 1), ("y", -1))
        for layer in (3, 4)
        for head in range(3)
    ]
)
STEPS = pd.DataFrame(
    [
        {"panel": "gamma 0", "step": step, "layer": layer, "head": head, "share": share}
        for step, layer, head, share in [(0, 10, 1, 0.5), (0, 3, 2, 0.25), (1, 10, 1, 1.0), (1, 9, 0, 0.125)]
    ]
)


def test_by_layer_shows_every_line_in_every_panel_in_order_of_layers() -> None:
    levels = pd.DataFrame({"panel": ["DNS", "RS"], "line": ["vanilla", "vanilla"], "mean": [0.9, 0.8]})
    figure = plots.by_layer(LINES, levels)
    drawn = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len(drawn) == 4 and all(list(trace.x) == [0, 1, 2] for trace in drawn)
    assert [trace.name for trace in drawn] == ["a&lt;b", "b"] * 2
    assert list(drawn[1].y) == pytest.approx([0.01, 0.11, 0.21])
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    assert len(bands) == 4 and all(trace.mode == "lines" and not trace.showlegend for trace in bands)
    dotted = [trace for trace in figure.data if trace.line.dash == "dot"]
    assert [list(trace.y) for trace in dotted] == [[0.9, 0.9], [0.8, 0.8]]
    assert [note.text for note in figure.layout.annotations] == ["DNS", "RS"]
    # Each name once in the legend.
    assert sorted(trace.name for trace in figure.data if trace.showlegend) == ["a&lt;b", "b", "vanilla"]


def test_by_layer_of_lines_that_are_not_in_every_panel() -> None:
    figure = plots.by_layer(LINES[~((LINES["panel"] == "DNS") & (LINES["line"] == "b"))].drop(columns=["low", "high"]))
    assert sorted(trace.name for trace in figure.data if trace.showlegend) == ["a&lt;b", "b"]
    assert len(figure.data) == 3


def test_head_map_is_layer_by_head_on_one_scale() -> None:
    figure = plots.head_map(HEADS, "drift", "unit")
    first, second = figure.data
    assert first.z.tolist() == [[3.0, 3.1, 3.2], [4.0, 4.1, 4.2]]
    assert (second.z == -first.z).all() and list(first.y) == ["3", "4"] and list(first.x) == ["0", "1", "2"]
    scale = figure.layout.coloraxis
    assert (scale.cmin, scale.cmax, scale.colorbar.title.text) == (-4.2, 4.2, "unit")
    positive = plots.head_map(HEADS[HEADS["panel"] == "x"], "drift")
    assert positive.layout.coloraxis.cmin == 0


def test_heads_by_step_has_a_row_per_head_in_order() -> None:
    figure = plots.heads_by_step(STEPS)
    (trace,) = figure.data
    assert list(trace.y) == ["L3H2", "L9H0", "L10H1"] and list(trace.x) == [0, 1]
    assert trace.z.tolist() == [[0.25, 0.0], [0.0, 0.125], [0.5, 1.0]]
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)


@pytest.mark.parametrize("n", range(1, 8))
def test_panels_stand_in_rows_of_at_most_three(n: int) -> None:
    frame = pd.concat([HEADS[HEADS["panel"] == "x"].assign(panel=f"p{i}") for i in range(n)])
    figure = plots.head_map(frame, "t")
    titles = [note.text for note in figure.layout.annotations]
    assert titles == [f"p{i}" for i in range(n)]
    domains = {tuple(figure.layout[f"xaxis{i + 1 if i else ''}"].domain) for i in range(n)}
    assert len(domains) <= 3


def test_tables_that_lack_something_are_named() -> None:
    for plot, frame in ((plots.by_layer, LINES), (plots.heads_by_step, STEPS)):
        with pytest.raises(ValueError, match=r"lacks the columns \['layer'\]"):
            plot(frame.drop(columns="layer"))
        with pytest.raises(ValueError, match="has no row"):
            plot(frame.iloc[:0])
    with pytest.raises(ValueError, match=r"lacks the columns \['value'\]"):
        plots.head_map(HEADS.drop(columns="value"), "t")
