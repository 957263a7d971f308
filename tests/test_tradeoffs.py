"""Points of the trade-offs, what is read off at equal efficacy, outcomes on disk, intervals by group."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import attn_drift as ad
from analysis.comparison import tradeoffs
from analysis.comparison.arms import Outcome
from analysis.comparison.equal_efficacy import at_equal_efficacy, efficacy
from analysis.comparison.tradeoffs import Point, points
from analysis.scoring.scores import Scores
from analysis.statistics import bootstrap, grouped_intervals
from attn_drift.restrictions.hidden_state import HiddenState
from attn_drift.restrictions.sadr import SADR

CONFIG = ad.ROMEConfig(layer=2, steps=24, clamp=4.0, kl_factor=0.0625)

# ---- the points


def by_line(found: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    table: dict[tuple[str, str], list[Point]] = {}
    for point in found:
        table.setdefault((point.study, point.line), []).append(point)
    return table


def made_by(point: Point) -> tuple[object, ...]:
    """What makes a point's edits. Without a weight a restriction changes nothing, whatever heads it looks at."""
    weight = getattr(point.restrict, "gamma", getattr(point.restrict, "weight", None))
    return point.wordings, point.config, point.restrict if weight else None


def test_every_line_starts_at_the_editor_as_it_is() -> None:
    """And turns its own knob, which has another value at each point."""
    own = {"kl_factor": CONFIG.kl_factor, "steps": float(CONFIG.steps), "clamp": CONFIG.clamp}
    for (study, line), places in by_line(points(CONFIG, 0.01, 3)).items():
        first = places[0]
        assert first.value == own.get(line, 0.0)
        assert isinstance(first.restrict, SADR) and first.restrict.gamma == 0
        if study == "wordings":  # whose editor has so many wordings, and that key
            assert first.wordings == int(line[0])
            assert first.config == replace(CONFIG, keys="mean" if "mean key" in line else "constrained")
        else:
            assert (first.wordings, first.config) == (1, CONFIG)
        values = [point.value for point in places]
        assert len(places) > 1 and len(set(values)) == len(values)
        for point in places:
            assert point.wordings == first.wordings
            if line in own:
                assert replace(first.config, **{line: getattr(point.config, line)}) == point.config
                assert float(getattr(point.config, line)) == point.value and point.restrict == first.restrict
            elif line == "hidden state, weight":
                assert point.config == CONFIG
                assert point is first or point.restrict == HiddenState(weight=point.value)
            else:
                assert point.config == first.config and isinstance(point.restrict, SADR)
                assert point.restrict.gamma == point.value
        # Lines go where efficacy falls: more weight, fewer steps, a smaller ball.
        assert values == sorted(values, reverse=line in ("steps", "clamp"))


def test_rules_hold_their_own_heads() -> None:
    lines = by_line(points(CONFIG, 0.01, 1))
    rules = [name for study, name in lines if study == "rules"]
    assert rules == ["layer_max", "all", "top 4", "margin 0.1", "random 1", "random 2"]
    held = {str(p.restrict.heads) for name in rules for p in lines["rules", name][1:] if isinstance(p.restrict, SADR)}
    assert len(held) == 6
    gammas = [p.value for p in lines["rules", "layer_max"]]
    assert gammas == [0.0, 0.001, 0.01, 0.1]


@pytest.mark.parametrize("gamma", [0.01, 0.0023])
def test_points_of_one_arm_make_the_same_edits(gamma: float) -> None:
    found = points(CONFIG, gamma, 3)
    for a, b in itertools.combinations(found, 2):
        if a.arm == b.arm:
            assert made_by(a) == made_by(b)
        elif made_by(a)[2] is not None or made_by(b)[2] is not None:
            assert made_by(a) != made_by(b)


def test_the_same_edits_have_one_arm() -> None:
    found = points(CONFIG, 0.01, 3)
    for a, b in itertools.combinations(found, 2):
        assert (a.arm == b.arm) == (made_by(a) == made_by(b)), (a, b)


def test_lines_that_start_at_the_editor_share_their_first_arm() -> None:
    lines = by_line(points(CONFIG, 0.01, 3))
    first = {line: places[0] for line, places in lines.items() if places[0].wordings == 1}
    assert len({point.arm for point in first.values()}) == 1, {line: point.arm for line, point in first.items()}


def test_arms_are_the_same_in_another_process_and_of_another_editor_others() -> None:
    one, again = (([p.arm for p in points(ad.ROMEConfig(layer=2), 0.01, 2)]) for _ in range(2))
    assert one == again
    other = [p.arm for p in points(ad.ROMEConfig(layer=1), 0.01, 2)]
    assert not set(one) & set(other)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_more_wordings_than_there_are(most: int) -> None:
    found = points(CONFIG, 0.01, most)
    assert {p.wordings for p in found} == set(range(1, most + 1))
    expected = ["1 wording", "2 wordings", "2 wordings, mean key", "3 wordings"][: (1, 3, 4)[most - 1]]
    assert [line for study, line in by_line(found) if study == "wordings"] == expected
    fewer = [p for p in points(CONFIG, 0.01, 3) if p.wordings <= most]
    assert found == fewer


def test_few_steps_stay_at_least_one() -> None:
    steps = [p.config.steps for p in points(replace(CONFIG, steps=2), 0.01, 1) if p.line == "steps"]
    assert steps[0] == 2 and min(steps) >= 1


def test_the_reference_of_the_lines() -> None:
    found = [(point, outcome_of(table({"ES": [[0.1 * i]], "PS": [[0.5]]})))
             for i, point in enumerate(points(CONFIG, 0.01, 1))]  # fmt: skip
    lines, reference = tradeoffs.lines(found, 0.01)
    assert reference is next(o.scores for p, o in found if (p.line, p.value) == ("layer_max", 0.01))
    assert [(line, v) for line, places in lines.items() for v, _ in places] == [
        ((p.study, p.line), p.value) for p, _ in found
    ]


def test_the_reference_of_a_weight_with_many_digits() -> None:
    outcome = outcome_of(table({"ES": [[0.1]], "PS": [[0.5]]}))
    found = [(point, outcome) for point in points(CONFIG, 0.012345, 1)]
    assert tradeoffs.lines(found, 0.012345)[1] is outcome.scores


# ---- at equal efficacy


def table(values: dict[str, list[list[float]]], successes: dict[str, list[list[bool]]] | None = None) -> Scores:
    """Scores of p(right) by task, case and text; success is p above 1/2 where it is not given."""
    rows = []
    for task, cases in values.items():
        for i, texts in enumerate(cases):
            for j, p in enumerate(texts):
                success = p > 0.5 if successes is None else successes[task][i][j]
                rows.append({"case": f"c{i}", "task": task, "text": f"{i} {j}", "p_right": p, "success": success})
    return Scores.from_rows(rows)


def arm_of(es: float, ps: float, dns: float, rs: float, n: int = 3) -> Scores:
    """Of cases that are all alike, so that every draw is the same: success in the given share of 8 texts."""

    def shares(share: float) -> list[list[bool]]:
        return [[k < round(8 * share) for k in range(8)]] * n

    values = {"ES": [[es]] * n, "PS": [[ps]] * n, "DNS": [[dns / 2] * 8] * n, "RS": [[rs / 4] * 8] * n}
    return table(values, {"ES": [[True]] * n, "PS": [[True]] * n, "DNS": shares(dns), "RS": shares(rs)})


def test_efficacy_is_the_mean_over_tasks() -> None:
    """Tasks weigh alike, and within one all texts: ES (1 + 0 + 1/2) / 3, PS (0.2 + 0.4 + 0.6 + 0.8) / 4."""
    scores = table({"ES": [[1.0], [0.0, 0.5]], "PS": [[0.2, 0.4, 0.6], [0.8]], "DNS": [[0.1], [0.1]]})
    assert efficacy(scores) == pytest.approx((0.5 + 0.5) / 2)
    scores = table({"ES": [[1.0], [0.0]], "PS": [[], [0.8]], "RS": [[0.9], [0.9]]})  # a case without paraphrases
    assert efficacy(scores) == pytest.approx((0.5 + 0.8) / 2)


def test_no_efficacy_without_paraphrases() -> None:
    scores = table({"ES": [[0.8], [0.8]], "DNS": [[0.1], [0.1]], "RS": [[0.1], [0.1]]})
    with pytest.raises(ValueError, match=r"no texts of \['PS'\], which efficacy is made of"):
        efficacy(scores)


LINE = ("s", "l")
START, MIDDLE, END = arm_of(0.9, 0.9, 0.25, 0.5), arm_of(0.8, 0.6, 0.5, 0.75), arm_of(0.3, 0.5, 1.0, 0.25)


def read(places: list[tuple[float, Scores]], reference: Scores) -> dict[str, Any]:
    frame = at_equal_efficacy({LINE: places}, reference)
    assert len(frame) == 1
    return frame.iloc[0].to_dict()


COLUMNS = [f"{name}{end}" for name in ("DNS", "RS", "DNS_p", "RS_p")
           for end in ("", "_low", "_high", "_difference", "_difference_low", "_difference_high")]  # fmt: skip


def test_a_crossing_between_two_points_by_hand() -> None:
    """Efficacies 0.9, 0.7 and 0.4; 0.6 lies at a third of the way from the second to the third."""
    reference = arm_of(0.6, 0.6, 0.125, 0.5)
    row = read([(0.0, START), (1.0, MIDDLE), (10.0, END)], reference)
    assert list(row) == ["study", "line", "state", "value", "reached", *COLUMNS]
    assert (row["study"], row["line"], row["reached"]) == (*LINE, 1.0)
    assert row["value"] == pytest.approx(1 + 9 / 3)
    expected = {
        "DNS": 0.5 + 0.5 / 3,
        "RS": 0.75 - 0.5 / 3,
        "DNS_p": 0.25 + 0.25 / 3,
        "RS_p": (0.75 - 0.5 / 3) / 4,
    }
    wanted = {"DNS": 0.125, "RS": 0.5, "DNS_p": 0.0625, "RS_p": 0.125}
    for name, value in expected.items():
        # All cases are alike: intervals are points.
        for end in ("", "_low", "_high"):
            assert row[name + end] == pytest.approx(value)
            assert row[f"{name}_difference{end}"] == pytest.approx(value - wanted[name])


def test_an_exact_hit_at_a_point() -> None:
    row = read([(0.0, START), (1.0, MIDDLE), (10.0, END)], arm_of(0.8, 0.6, 0.0, 0.0))
    assert (row["value"], row["DNS"], row["RS"], row["reached"]) == (1.0, 0.5, 0.75, 1.0)
    last = read([(0.0, START), (10.0, END)], END)
    assert (last["value"], last["DNS"], last["DNS_difference"]) == (10.0, 1.0, 0.0)
    first = read([(0.0, START), (10.0, END)], START)
    assert (first["value"], first["DNS"], first["DNS_difference"]) == (0.0, 0.25, 0.0)


@pytest.mark.parametrize("reference", [arm_of(0.3, 0.3, 1.0, 1.0), arm_of(1.0, 0.9, 0.0, 0.0)])
def test_a_line_that_never_reaches_or_starts_below(reference: Scores) -> None:
    row = read([(0.0, START), (1.0, MIDDLE), (10.0, END)], reference)
    assert row["reached"] == 0 and math.isnan(row["value"])
    assert row["state"] == ("stays above" if efficacy(reference) < 0.5 else "starts below")
    assert all(math.isnan(row[name]) for name in COLUMNS)


def test_a_constant_line() -> None:
    """Where efficacy does not change, the first point is what is read off; nowhere if it is another."""
    others = [arm_of(0.9, 0.9, share, 0.5) for share in (0.25, 0.5, 1.0)]
    places = list(zip((2.0, 3.0, 4.0), others, strict=True))
    row = read(places, START)
    assert (row["value"], row["DNS"], row["reached"]) == (2.0, 0.25, 1.0)
    assert math.isnan(read(places, MIDDLE)["value"]) and read(places, MIDDLE)["reached"] == 0


def test_the_first_of_two_crossings() -> None:
    places = [(0.0, START), (1.0, END), (2.0, START), (3.0, END)]
    row = read(places, arm_of(0.65, 0.65, 0.0, 0.0))
    assert row["value"] == pytest.approx(0.5)


def test_a_line_that_starts_below_and_rises() -> None:
    row = read([(0.0, END), (1.0, START), (2.0, END)], arm_of(0.65, 0.65, 0.0, 0.0))
    assert math.isnan(row["value"])


def random_arm(seed: int, level: float, n: int = 6) -> Scores:
    """Cases that differ, with unequal numbers of texts; efficacy around a level."""
    rng = np.random.default_rng(seed)
    values = {
        task: [np.clip(level + rng.normal(size=1 + (i + k) % 3) / 20, 0, 1).tolist() for i in range(n)]
        for k, task in enumerate(("ES", "PS", "DNS", "RS"))
    }
    values["DNS"] = [rng.random(2).tolist() for _ in range(n)]
    values["RS"] = [rng.random(2).tolist() if i else [] for i in range(n)]  # the first case has none
    return table(values)


@pytest.mark.parametrize("seed", range(3))
def test_the_references_own_line_gives_no_difference(seed: int) -> None:
    places = [(float(i), random_arm(10 * seed + i, level)) for i, level in enumerate((0.9, 0.6, 0.3, 0.1))]
    for place in range(4):
        row = read(places, places[place][1])
        assert row["value"] == place and row["reached"] == 1
        for name in ("DNS", "RS", "DNS_p", "RS_p"):
            assert row[f"{name}_difference"] == row[f"{name}_difference_low"] == row[f"{name}_difference_high"] == 0
            assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]


def mean_of(scores: Scores, task: str, column: str) -> float:
    frame = scores.frame[scores.frame["task"] == task]
    return float(np.mean(frame[column].astype(float)))


MEASURED = {"DNS": ("DNS", "success"), "RS": ("RS", "success"), "DNS_p": ("DNS", "p_right"), "RS_p": ("RS", "p_right")}


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.lists(st.floats(0.1, 0.9), min_size=2, max_size=4), st.floats(0.15, 0.85))
def test_what_is_read_off_lies_between_neighbors(seed: int, levels: list[float], level: float) -> None:
    arms = [random_arm(seed + 1 + i, own) for i, own in enumerate(levels)]
    reference = random_arm(seed, level)
    places = list(zip([1.0 * i * i for i in range(len(arms))], arms, strict=True))
    own = [(mean_of(arm, "ES", "p_right") + mean_of(arm, "PS", "p_right")) / 2 for arm in arms]
    wanted = (mean_of(reference, "ES", "p_right") + mean_of(reference, "PS", "p_right")) / 2
    assert efficacy(reference) == pytest.approx(wanted)
    assume(own[0] >= wanted)
    row = read(places, reference)
    below = [i for i, value in enumerate(own) if value <= wanted]
    if not below:
        assert math.isnan(row["value"])
        return
    i = below[0] - 1
    assert places[i][0] <= row["value"] <= places[i + 1][0]
    part = (own[i] - wanted) / (own[i] - own[i + 1])
    for name, (task, column) in MEASURED.items():
        ends = mean_of(arms[i], task, column), mean_of(arms[i + 1], task, column)
        assert min(ends) - 1e-9 <= row[name] <= max(ends) + 1e-9
        assert row[name] == pytest.approx((1 - part) * ends[0] + part * ends[1], abs=1e-6)
        assert row[f"{name}_difference"] == pytest.approx(row[name] - mean_of(reference, task, column), abs=1e-9)
        known = row["reached"] >= 0.95
        assert row[f"{name}_low"] <= row[f"{name}_high"] if known else math.isnan(row[f"{name}_low"])
    assert 0 < row["reached"] <= 1


def test_draws_are_read_off_one_by_one() -> None:
    """Against tables in which a case stands as often as it was drawn; some draws do not reach the reference."""
    n = 4
    places = [(0.0, random_arm(1, 0.62, n)), (1.0, random_arm(2, 0.55, n)), (5.0, random_arm(3, 0.45, n))]
    reference = random_arm(4, 0.48, n)
    row = read(places, reference)
    assert 0 < row["reached"] < 1 and np.isfinite(row["value"])

    def means(scores: Scores, drawn: list[int]) -> list[float]:
        result = []
        for task, column in (("ES", "p_right"), ("PS", "p_right"), *MEASURED.values()):
            frame = scores.frame[scores.frame["task"] == task]
            texts = {i: frame.loc[frame["case"] == f"c{i}", column].astype(float).tolist() for i in set(drawn)}
            values = [value for i in drawn for value in texts[i]]
            result.append(sum(values) / len(values) if values else math.nan)
        return result

    rng = np.random.default_rng(0)
    drawn = [one for _ in range(20) for one in rng.integers(n, size=(100, n)).tolist()]
    known: dict[tuple[int, ...], list[float] | None] = {}
    for one in {tuple(sorted(one)) for one in drawn}:
        wanted, found = means(reference, list(one)), None
        curve = [means(scores, list(one)) for _, scores in places]
        goal = (wanted[0] + wanted[1]) / 2
        own = [(mean[0] + mean[1]) / 2 for mean in curve]
        for i in range(2):
            if found is None and own[i] >= goal >= own[i + 1]:
                part = (own[i] - goal) / (own[i] - own[i + 1])
                found = [(1 - part) * a + part * b - w
                         for a, b, w in zip(curve[i][2:], curve[i + 1][2:], wanted[2:], strict=True)]  # fmt: skip
        known[one] = found
    reached = [known[tuple(sorted(one))] for one in drawn]
    differences = np.array([found for found in reached if found is not None])
    assert row["reached"] == pytest.approx(len(differences) / 2000)
    for i, name in enumerate(MEASURED):
        column = differences[:, i]
        low, high = np.quantile(column[np.isfinite(column)], (0.025, 0.975))
        assert row[f"{name}_difference_low"] == pytest.approx(low, abs=1e-9)
        assert row[f"{name}_difference_high"] == pytest.approx(high, abs=1e-9)


def test_without_rs_texts() -> None:
    def lacking(scores: Scores) -> Scores:
        return Scores(scores.frame[scores.frame["task"] != "RS"])

    whole = read([(0.0, START), (10.0, END)], MIDDLE)
    frame = at_equal_efficacy({LINE: [(0.0, lacking(START)), (10.0, lacking(END))]}, lacking(MIDDLE))
    assert not [name for name in frame.columns if name.startswith("RS")]
    row = frame.iloc[0].to_dict()
    assert row == {name: value for name, value in whole.items() if name in row} and row["DNS_p"] > 0


def test_lines_are_read_off_apart() -> None:
    lines = {("a", "x"): [(0.0, START), (1.0, END)], ("b", "y"): [(0.0, START), (1.0, MIDDLE)]}
    frame = at_equal_efficacy(lines, arm_of(0.5, 0.5, 0.5, 0.5))
    assert frame[["study", "line"]].to_numpy().tolist() == [["a", "x"], ["b", "y"]]
    assert frame["value"].tolist() == pytest.approx([0.8, math.nan], nan_ok=True)
    assert frame["reached"].tolist() == [1, 0]


# ---- outcomes on disk


def outcome_of(scores: Scores, selects: bool = True) -> Outcome:
    heads = pd.DataFrame({"layer": [0, 0, 1], "head": [0, 1, 0], "attention": [0.1, 1 / 3, 0.7]})
    if not selects:
        return Outcome(scores, 0.7, heads.assign(selected=np.nan), None, None)
    steps = pd.DataFrame({"step": [0, 1], "layer": [1, 1], "head": [0, 0], "share": [1 / 3, 0.0]})
    together = {"jaccard": 1 / 3, "chance": math.nan, "size": 1.5}
    return Outcome(scores, 0.1 + 0.2, heads.assign(selected=[0.0, 0.5, 1.0]), steps, together)


@pytest.mark.parametrize("selects", [True, False])
def test_outcomes_come_back(tmp_path: Path, selects: bool) -> None:
    outcome = outcome_of(random_arm(0, 0.5), selects)
    assert outcome.scores.frame["wrong"].isna().all()  # columns of nothing come back as well
    outcome.save(tmp_path / "a" / "b")
    found = Outcome.load(tmp_path / "a" / "b")
    assert found is not None
    pd.testing.assert_frame_equal(found.scores.frame, outcome.scores.frame)
    pd.testing.assert_frame_equal(found.heads, outcome.heads)
    assert found.max_head == outcome.max_head
    assert (found.overlap is None) == (found.steps is None) == (not selects)
    if selects:
        assert found.steps is not None and outcome.steps is not None and outcome.overlap is not None
        pd.testing.assert_frame_equal(found.steps, outcome.steps)
        assert found.overlap == pytest.approx(outcome.overlap, rel=0, abs=0, nan_ok=True)
    assert efficacy(found.scores) == efficacy(outcome.scores)
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_outcome_that_was_not_written_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Outcome.load(tmp_path / "nowhere") is None
    outcome = outcome_of(random_arm(0, 0.5))
    to_parquet, written = pd.DataFrame.to_parquet, []

    def failing(self: pd.DataFrame, *args: Any, **options: Any) -> None:
        if len(written) == 2:
            raise OSError("the disk is full")
        written.append(self)
        to_parquet(self, *args, **options)

    monkeypatch.setattr(pd.DataFrame, "to_parquet", failing)
    with pytest.raises(OSError, match="full"):
        outcome.save(tmp_path)
    assert list(tmp_path.glob("*.parquet")) and Outcome.load(tmp_path) is None
    monkeypatch.undo()
    outcome.save(tmp_path)
    assert Outcome.load(tmp_path) is not None
    (tmp_path / "outcome.json").unlink()
    assert Outcome.load(tmp_path) is None


# ---- intervals by group


@pytest.mark.parametrize("by", [("kind",), ("kind", "layer")])
def test_intervals_by_group(by: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"case": f"c{case}", "kind": kind, "layer": layer, "p": rng.normal() + case}
        for kind, layer in (("z", 2), ("a", 1), ("z", 1), ("m", 2))
        for case in range(5)
        for _ in range(1 + (case * 7 + layer) % 3)
        if (kind, case) != ("m", 0)
    ]
    frame = pd.DataFrame(rows)
    found = grouped_intervals(frame, by, "p", seed=3)
    assert list(found.columns) == [*by, "mean", "low", "high", "n", "n_cases"]
    order = list(dict.fromkeys(tuple(row[name] for name in by) for row in rows))
    assert [tuple(row) for row in found[list(by)].itertuples(index=False)] == order
    means = frame.groupby(list(by))["p"].mean()
    for row in found.itertuples():
        key = tuple(getattr(row, name) for name in by)
        mine = [one for one in rows if tuple(one[name] for name in by) == key]
        assert row.mean == pytest.approx(means.loc[key if len(by) > 1 else key[0]])
        cases = sorted({one["case"] for one in mine})
        values = {case: [one["p"] for one in mine if one["case"] == case] for case in cases}
        totals = np.array([sum(values[case]) for case in cases])
        counts = np.array([len(values[case]) for case in cases])
        assert (row.low, row.high) == pytest.approx(bootstrap(totals, counts, 3))
        assert (row.n, row.n_cases) == (len(mine), len(cases))
        # And anew: whole cases are drawn, and all their rows weigh alike.
        assert (row.low, row.high) == pytest.approx(np.quantile(naive(values, cases, 3), (0.025, 0.975)))
        assert row.low < row.mean < row.high


def naive(values: dict[str, list[float]], cases: list[str], seed: int) -> list[float]:
    """Means of tables in which a case stands as often as it was drawn."""
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(20):
        for drawn in rng.integers(len(cases), size=(100, len(cases))).tolist():
            rows = [p for i in drawn for p in values[cases[i]]]
            means.append(sum(rows) / len(rows))
    return means


def test_a_group_of_one_case() -> None:
    frame = pd.DataFrame({"case": ["a", "a"], "kind": ["k", "k"], "p": [True, False]})
    row = grouped_intervals(frame, ["kind"], "p").iloc[0]
    assert row[["mean", "low", "high", "n", "n_cases"]].tolist() == [0.5, 0.5, 0.5, 2, 1]
