"""The speed of value steps, scoring and the benchmark: fast path against plain one, equal results asserted.

Nothing here fails for being slow: `docs/performance.md` says what was measured and what was hoped for.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from comparison import OUT, Comparison, Report
from floors import Cost, Speed, benchmark_floor, operations_done, scoring_floor, step_floor
from growth import figure, growth
from memory import peak
from workloads import CLOCK, SADR, STEPS, Lab, part, seconds

from attn_drift.files import replacing
from attn_drift.prompts import request_prompts
from attn_drift.restrictions.base import Restriction

pytestmark = pytest.mark.benchmark(timer=CLOCK)

Compare = Callable[..., Comparison]

RESTRICTIONS: dict[str, Restriction | None] = {"ROME": None, "ROME + SADR": SADR}
ROUNDS = {1: 5, 8: 3, 32: 2}
# Of differences of two times, which spread more.
STEPS_TIMED = {1: 20, 8: 8, 32: 4}
TOLERANCE = 1e-4


@pytest.mark.parametrize("n", ROUNDS)
@pytest.mark.parametrize("name", RESTRICTIONS)
def test_values(lab: Lab, compare: Compare, name: str, n: int) -> None:
    """Whole optimizations, set-up included: all requests at once, against one request at a time, another each round."""
    texts, restrict = lab.texts(n), RESTRICTIONS[name]
    compare(
        f"{name}, {n} at once, {STEPS} steps",
        "edit",
        lambda _: seconds(lambda: lab.values(texts, restrict, STEPS, False)) / n,
        {"whole texts, one request": lambda i: seconds(lambda: lab.values([texts[i % n]], restrict, STEPS, True))},
        ROUNDS[n],
    )


@pytest.mark.parametrize("n", STEPS_TIMED)
@pytest.mark.parametrize("name", RESTRICTIONS)
def test_steps(lab: Lab, compare: Compare, speed: Speed, report: Report, name: str, n: int) -> None:
    """A step, set-up left out: both paths with all requests at once."""
    texts, restrict, steps = lab.texts(n), RESTRICTIONS[name], STEPS_TIMED[n]
    for a, b in zip(*(lab.values(texts, restrict, 5, whole) for whole in (False, True)), strict=True):
        assert (a.delta - b.delta).norm() <= TOLERANCE * b.delta.norm()
        np.testing.assert_allclose(a.history.terms, b.history.terms, rtol=TOLERANCE, atol=TOLERANCE)
    done = compare(
        f"{name}, {n} at once",
        "step and edit",
        lambda _: lab.step(texts, restrict, steps, False),
        {"whole texts, as many at once": lambda _: lab.step(texts, restrict, steps, True)},
        2 if n == 32 else 3,
    )
    operations = [
        operations_done(lambda w=whole: lab.values(texts, restrict, 2, w))
        - operations_done(lambda w=whole: lab.values(texts, restrict, 1, w))
        for whole in (False, True)
    ]
    found = _against_floor(step_floor(lab.model, texts, lab.config.layer), speed, n * float(np.median(done.fast)))
    found |= {"operations_fast": operations[0], "operations_plain": operations[1]}
    found["set_up"] = seconds(lambda: lab.values(texts, restrict, 1, False)) / n
    report.figures[f"step: {name}, {n} at once"] = found


@pytest.mark.parametrize("n", [8, 32])
def test_scoring(lab: Lab, compare: Compare, speed: Speed, report: Report, n: int) -> None:
    """Every text of some cases under their edits: in batches, against one text at a time, of the first four cases."""
    edits, few = lab.edits(n), 4
    batched, alone = (lab.scores(edits[:few], way).frame for way in (False, True))
    _assert_equal(batched, alone)
    done = compare(
        f"scoring {n} cases",
        "case",
        lambda _: seconds(lambda: lab.scores(edits, False)) / n,
        {f"one text at a time, {few} cases": lambda _: seconds(lambda: lab.scores(edits[:few], True)) / few},
        3,
    )
    found = _against_floor(scoring_floor(lab.model, lab.cases[:n]), speed, n * float(np.median(done.fast)))
    found["operations_fast"] = operations_done(lambda: lab.scores(edits, False))
    report.figures[f"scoring {n} cases"] = found


def test_benchmark(lab: Lab, compare: Compare, speed: Speed, report: Report) -> None:
    """50 cases edited by ROME + SADR and scored: chunks of 16, against three cases of each, one by one."""
    worker, few = lab.worker(), 3
    chunks = [lab.cases[i : min(i + 16, 50)] for i in range(0, 50, 16)]
    batched: list[pd.DataFrame] = []
    alone: list[pd.DataFrame] = []

    def fast(i: int) -> float:
        return seconds(lambda: batched.append(part(worker, chunks[i], False))) / len(chunks[i])

    def plain(i: int) -> float:
        return seconds(lambda: alone.append(part(worker, chunks[i][:few], True))) / len(chunks[i][:few])

    label = f"one case, one text at a time, {few} cases of a chunk"
    done = compare("benchmark, 50 cases: chunks of 16, 16, 16, 2", "case", fast, {label: plain}, 4)
    sizes = np.array([len(chunk) for chunk in chunks])
    contexts = worker.inputs.contexts(lab.config.context_lengths)
    texts = [request_prompts(lab.model, case.request, contexts) for case in chunks[0]]
    floor = benchmark_floor(lab.model, chunks[0], texts, lab.config.steps)
    report.figures["benchmark"] = {
        "seconds": float(sizes @ done.fast),
        "seconds_plain_extrapolated": float(sizes @ done.plain[label]),
        "first_chunk": _against_floor(floor, speed, len(chunks[0]) * done.fast[0]),
        **_differences(pd.concat(batched), pd.concat(alone)),
    }


def test_growth(lab: Lab) -> None:
    """Written as ``growth.csv`` and ``growth.html``."""
    rows = pd.DataFrame(growth(lab), columns=["what", "size", "path", "seconds"])
    with replacing(OUT / "growth.csv") as temporary:
        rows.to_csv(temporary, index=False)
    with replacing(OUT / "growth.html") as temporary:
        figure(rows).write_html(temporary, include_plotlyjs=True)


def test_overhead(lab: Lab, report: Report) -> None:
    """Of a step on a single text and the essence text, in which hardly anything but calls is left to pay for."""
    alone = [request_prompts(lab.model, lab.cases[0].request, ["{}"])]
    report.figures["seconds of a step on one text"] = lab.step(alone, SADR, 40, False)


@pytest.mark.parametrize(("work", "n"), [("sadr", 1), ("sadr", 8), ("sadr", 32), ("scoring", 32)])
def test_memory(report: Report, work: str, n: int) -> None:
    """Of both paths, each in a process of its own."""
    ways = ["fast", "plain", *(["plain-at-once"] if work == "sadr" and n > 1 else [])]
    report.figures[f"memory: {work} {n}"] = {way: peak(work, n, way) for way in ways}


def test_memory_of_the_benchmark(report: Report) -> None:
    """A chunk of 16 cases, against the first two of them one by one."""
    report.figures["memory: benchmark 16"] = {
        "fast": peak("benchmark", 16, "fast"),
        "plain, 2 cases": peak("benchmark", 2, "plain"),
    }


def _against_floor(floor: Cost, speed: Speed, took: float) -> dict[str, Any]:
    """A floor, in operations, bytes and seconds, and the fraction of it reached."""
    least = floor.seconds(speed)
    return {"operations": floor.operations, "bytes": floor.bytes, "floor": least, "took": took, "reached": least / took}


def _assert_equal(batched: pd.DataFrame, alone: pd.DataFrame) -> None:
    """The same texts, measures and answers."""
    assert list(batched["text"]) == list(alone["text"])
    for column in ("p_right", "p_wrong", "logp_right", "logp_wrong"):
        np.testing.assert_allclose(batched[column].astype(float), alone[column].astype(float), rtol=0, atol=TOLERANCE)
    assert list(batched["continuation"]) == list(alone["continuation"])


def _differences(batched: pd.DataFrame, alone: pd.DataFrame) -> dict[str, float]:
    """Between what both give for the texts that both scored; edits of 60 steps differ by what rounding has grown to."""
    keys = ["case", "task", "text"]
    both = alone[alone["p_right"].notna()].merge(batched, on=keys, suffixes=("_alone", ""), validate="one_to_one")
    difference = (both["p_right"] - both["p_right_alone"]).abs()
    agree = (both["success"] == both["success_alone"]).mean()
    assert len(both) == alone["p_right"].notna().sum() and agree >= 0.99
    return {"texts": len(both), "largest_difference_of_p": float(difference.max()), "pairwise_agree": float(agree)}
