"""Ways to edit on the axes of SADR's trade-off: rules for heads, wordings of the question, alternatives to attention.

Every line of a study starts at the same point, the editor as it is, and turns one knob. At equal *efficacy* (the
probability of the new object, averaged over the edit's prompt and over wordings that no edit used) lines are compared
by what they spare: each is read off where it crosses the efficacy of the paper's rule, linearly between its points.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray

from analysis.arms import Arm
from analysis.scores import Scores
from analysis.selection import Placebo, last_selected
from analysis.statistics import resampled_means
from attn_drift.cases import Case, Probe
from attn_drift.editors.rome import ROMEConfig
from attn_drift.hidden_state import HiddenState
from attn_drift.requests import SLOT, EditRequest, fill
from attn_drift.restriction import SADR, AllHeads, HeadRule, LayerMax, Margin, Restriction, TopK

RULES, WORDINGS, ALTERNATIVES = "rules", "wordings", "alternatives"
LAYER_MAX, RANDOM, PLAIN = "layer_max", "random", "rome"

# Weights of SADR in units of the preset, of the hidden-state penalty, and other knobs in units of the preset.
GAMMAS = (0.1, 1.0, 10.0)
WEIGHTS = (0.1, 1.0, 10.0)
KL_FACTORS = (10.0, 100.0)
STEPS = (1 / 6, 1 / 3)
CLAMPS = (1 / 2, 5 / 8)
MARGIN = 0.1
TOP_K = 4

TASKS = ("ES", "PS", "NS", "DNS", "RS")


@dataclass(frozen=True)
class Point:
    """One way to edit.

    Attributes:
        study, line, value: the study that it belongs to, the knob, and to what it is turned.
        wordings: number of wordings of the question in the edit.
        config, restrict: as `rome` takes them.
    """

    study: str
    line: str
    value: float
    wordings: int
    config: ROMEConfig
    restrict: Restriction | None

    @property
    def key(self) -> tuple[int, ROMEConfig, str]:
        """What makes the edits: points that share it share an arm."""
        return self.wordings, self.config, repr(self.restrict)


def points(config: ROMEConfig, gamma: float, most_wordings: int) -> list[Point]:
    """All points of all studies, the editor as it is at the start of each line.

    Args:
        config: the editor's settings.
        gamma: SADR's weight.
        most_wordings: how many wordings of a question there are, the edit's own included.
    """
    return [*_rules(config, gamma), *_wordings(config, gamma, most_wordings), *_alternatives(config, gamma)]


def _rules(config: ROMEConfig, gamma: float) -> Iterator[Point]:
    rules: dict[str, HeadRule] = {
        LAYER_MAX: LayerMax(),
        "all": AllHeads(),
        f"top {TOP_K}": TopK(TOP_K),
        f"margin {MARGIN:g}": Margin(MARGIN),
        RANDOM: Placebo(),
    }
    for name, rule in rules.items():
        # At weight 0 the rule does not matter, and the paper's is what is recorded.
        yield Point(RULES, name, 0.0, 1, config, SADR(gamma=0))
        for factor in GAMMAS:
            weight = _rounded(factor * gamma)
            yield Point(RULES, name, weight, 1, config, SADR(gamma=weight, heads=rule))


def _wordings(config: ROMEConfig, gamma: float, most: int) -> Iterator[Point]:
    mean = replace(config, keys="mean")
    lines = [("1 wording", 1, config), ("2 wordings", 2, config), ("2 wordings, mean key", 2, mean)]
    lines += [("3 wordings", 3, config), ("3 wordings, mean key", 3, mean)]
    for name, wordings, settings in lines:
        if wordings <= most:
            for weight in (0.0, *(_rounded(factor * gamma) for factor in GAMMAS[:2])):
                yield Point(WORDINGS, name, weight, wordings, settings, SADR(gamma=weight))


def _alternatives(config: ROMEConfig, gamma: float) -> Iterator[Point]:
    nothing = SADR(gamma=0)
    for factor in (0.0, *GAMMAS):
        weight = _rounded(factor * gamma)
        yield Point(ALTERNATIVES, "SADR, gamma", weight, 1, config, SADR(gamma=weight))
    yield Point(ALTERNATIVES, "hidden state, weight", 0.0, 1, config, nothing)
    for weight in WEIGHTS:
        yield Point(ALTERNATIVES, "hidden state, weight", weight, 1, config, HiddenState(weight=weight))
    for knob, factors in {"kl_factor": KL_FACTORS, "steps": STEPS, "clamp": CLAMPS}.items():
        own = getattr(config, knob)
        values = {max(1, round(own * factor)) if knob == "steps" else _rounded(own * factor) for factor in factors}
        for value in sorted({own, *values}):
            yield Point(ALTERNATIVES, knob, float(value), 1, replace(config, **{knob: value}), nothing)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def further_wordings(cases: Sequence[Case], most: int = 3) -> list[tuple[str, ...]]:
    """Wordings of each case's question beyond the edit's own, from its paraphrases: all but one, at most ``most - 1``.

    As many for every case; none where some case has but one paraphrase, or one whose subject is put otherwise.
    """
    found = []
    for case in cases:
        subject, paraphrases = case.request.subject, case.probes.get("PS", ())
        templates = [text.text.replace(subject, SLOT) for text in paraphrases if text.text.count(subject) == 1]
        templates = [template for template in templates if template.count("{") == template.count("}") == 1]
        found.append(tuple(templates[: max(0, min(most - 1, len(paraphrases) - 1))]))
    least = min(map(len, found))
    return [templates[:least] for templates in found]


def without_wordings(case: Case, templates: Sequence[str]) -> Case:
    """The case without the paraphrases that an edit uses: they would measure what was trained."""
    used = {fill(template, case.request.subject) for template in templates}
    left: tuple[Probe, ...] = tuple(probe for probe in case.probes.get("PS", ()) if probe.text not in used)
    return replace(case, probes={**case.probes, "PS": left}) if left else case


def request(case: Case, templates: Sequence[str], wordings: int) -> EditRequest:
    """The case's request in its first so many wordings."""
    return case.request.rephrased(*templates[: wordings - 1]) if wordings > 1 else case.request


def row(point: Point, arm: Arm) -> dict[str, Any]:
    """A point's row: means and intervals of the scores, ``efficacy``, ``max_head``, ``n_heads`` selected at the end."""
    result: dict[str, Any] = {"study": point.study, "line": point.line, "value": point.value, "editor": arm.editor}
    result |= {"gamma": arm.gamma, "wordings": point.wordings}
    for task in arm.scores.tasks:
        if task in TASKS:
            interval = arm.scores.interval(task)
            result |= {task: interval.mean, f"{task}_low": interval.low, f"{task}_high": interval.high}
    totals, counts = _sums(arm.scores)
    result["efficacy"] = float(_efficacy((totals.sum(0) / counts.sum(0))[None])[0])
    result["max_head"] = arm.attention.max_head(point.config.layer).mean().item()
    held = arm.edits is not None and all(e.history and e.history.selected is not None for e in arm.edits)
    result["n_heads"] = float(np.mean([len(s) for s in last_selected(arm.edits or [])])) if held else np.nan
    return result


Means = Float[NDArray[Any], "draw metric"]
# Of which means efficacy is made, and what is read off at equal efficacy.
MADE_OF = (("ES", "p_right"), ("PS", "p_right"))
READ_OFF = (("DNS", "success"), ("RS", "success"), ("DNS", "p_right"), ("RS", "p_right"))


def _sums(scores: Scores) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sums and counts by case of what comparisons need."""
    measures = [(task, column) for task, column in (*MADE_OF, *READ_OFF) if task in scores.tasks]
    tables = [scores.per_case(task, column) for task, column in measures]
    totals, counts = (pd.concat([t[name] for t in tables], axis=1).fillna(0.0).sort_index() for name in _SUMS)
    return totals.to_numpy(), counts.to_numpy()


_SUMS = ("total", "count")


def _efficacy(means: Means) -> Float[NDArray[Any], " draw"]:
    return np.asarray(means[:, : len(MADE_OF)].mean(1))


def at_equal_efficacy(
    lines: Mapping[tuple[str, str], Sequence[tuple[float, Scores]]], reference: Scores, seed: int = 0
) -> pd.DataFrame:
    """What each line spares where its efficacy is that of a reference.

    Points are joined from the first on, the editor as it is, by straight lines; what is read off lies where the
    efficacy first crosses the reference's. Intervals draw the same cases for every line and for the reference.

    Args:
        lines: by study and line the values of its knob, from the editor as it is on, with the scores of the same cases.
        reference: the scores whose efficacy the others are compared at.
        seed: of the draws.

    Returns:
        A row per line: ``study``, ``line``, ``value`` of the knob (NaN, like all that follows, where the line does not
        come down to the reference's efficacy, or starts below it), ``reached`` (share of the draws in which it does),
        and of each task DNS and RS that was scored the success there with ``_low`` and ``_high``, and its difference
        from the reference's, ``_difference`` with ``_difference_low`` and ``_difference_high``.
    """
    names = [f"{task}" if column == "success" else f"{task}_p" for task, column in READ_OFF if task in reference.tasks]
    wanted = _drawn(reference, seed)
    rows = []
    for (study, line), places in lines.items():
        knob = np.array([value for value, _ in places])
        curve = np.stack([_drawn(scores, seed) for _, scores in places], axis=1)
        read = _read_off(knob, curve, _efficacy(wanted))
        reached = np.isfinite(read[1:, 0])
        row: dict[str, Any] = {"study": study, "line": line, "value": read[0, 0], "reached": float(reached.mean())}
        for i, name in enumerate(names):
            column, difference = read[:, 1 + i], read[:, 1 + i] - wanted[:, len(MADE_OF) + i]
            row |= {name: column[0], f"{name}_low": np.nan, f"{name}_high": np.nan}
            row |= {f"{name}_difference": difference[0]}
            row |= {f"{name}_difference_low": np.nan, f"{name}_difference_high": np.nan}
            if np.isfinite(read[0, 0]) and reached.any():
                row[f"{name}_low"], row[f"{name}_high"] = _percentiles(column[1:])
                row[f"{name}_difference_low"], row[f"{name}_difference_high"] = _percentiles(difference[1:])
        rows.append(row)
    return pd.DataFrame(rows)


def _percentiles(values: NDArray[Any]) -> tuple[float, float]:
    low, high = np.nanquantile(values, (0.025, 0.975))
    return float(low), float(high)


def _drawn(scores: Scores, seed: int) -> Means:
    """Means over all cases, and over draws of cases."""
    totals, counts = _sums(scores)
    return np.concatenate([(totals.sum(0) / counts.sum(0))[None], resampled_means(totals, counts, seed)])


def _read_off(
    knob: Float[NDArray[Any], " point"],
    curve: Float[NDArray[Any], "draw point metric"],
    efficacy: Float[NDArray[Any], " draw"],
) -> Float[NDArray[Any], "draw column"]:
    """Per draw the knob's value and the metrics where the curve first comes down to an efficacy; NaN if it does not."""
    own = np.stack([_efficacy(curve[:, point]) for point in range(len(knob))], axis=1)
    values = np.concatenate(
        [np.broadcast_to(knob[None, :, None], (*own.shape, 1)), curve[:, :, len(MADE_OF) :]], axis=2
    )
    result = np.full((len(own), values.shape[2]), np.nan)
    for point in range(len(knob) - 1):
        above, below = own[:, point], own[:, point + 1]
        crosses = np.isnan(result[:, 0]) & (above >= efficacy) & (below <= efficacy)
        drop = np.where(above > below, above - below, 1.0)
        part = np.where(above > below, (above - efficacy) / drop, 0.0)[crosses, None]
        result[crosses] = (1 - part) * values[crosses, point] + part * values[crosses, point + 1]
    return result
