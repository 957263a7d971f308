"""Scores against a slow computation of one text at a time; intervals; cases of the demo world."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from analysis.scores import Scores, results_row
from small_models import make_hf_model, make_tokenizer
from test_edits import random_edit
from transformer_lens.model_bridge import TransformerBridge

import attn_drift as ad
from analysis.specificity import score
from analysis.statistics import bootstrap
from attn_drift.cases import Case, Probe
from attn_drift.demo.cases import demo_cases, rephrased
from attn_drift.demo.world import World, make_world
from attn_drift.models import demo_folder

Make = Callable[..., TransformerBridge]

CASES = [
    Case(
        "first",
        ad.EditRequest("{} plays the", "Ada Bellini", "cello", "piano"),
        {
            "ES": (Probe("Ada Bellini plays the", "cello", "piano"),),
            "DNS": (Probe("Ada Bellini plays the cello. Carla plays the", "zither quartet", "cello"),),
        },
    ),
    Case(
        "second",
        ad.EditRequest("The man met {} in", "Carla", "a town", "Lima"),
        {"ES": (Probe("The man met Carla in", "a town", "Lima"), Probe("I saw Carla in", "a town", "Lima"))},
    ),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("edited", [False, True])
def test_scores_equal_one_text_at_a_time(
    make_model: Make, architecture: str, side: str, bos: bool, edited: bool
) -> None:
    model = make_model(architecture, bos=bos)
    model.tokenizer.padding_side = side
    edits = [random_edit(model, 0), random_edit(model, 1)] if edited else [None, None]
    frame = score(model, CASES, edits if edited else None).frame
    assert len(frame) == 4
    tokenizer, hf = make_tokenizer(bos), make_hf_model(architecture)
    by_case = {case.case_id: edit for case, edit in zip(CASES, edits, strict=True)}
    for row in frame.itertuples():
        hf = make_hf_model(architecture)
        edit = by_case[row.case]
        if edit is not None:
            for weight in hf.state_dict().values():
                weight.requires_grad_(False)
            bridge = ad.load_model(hf, tokenizer, device="cpu")
            edit.write_to(bridge)
        totals = {}
        for name, target in (("right", row.right), ("wrong", row.wrong)):
            prompt = tokenizer(row.text)["input_ids"]
            answer = tokenizer(" " + target, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = hf(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            at = logits[len(prompt) - 1 : -1]
            totals[name] = at[range(len(answer)), answer]
            if name == "right":
                assert row.argmax == (at.argmax(-1).tolist() == answer)
        assert row.logp_right == pytest.approx(totals["right"].mean().item(), abs=1e-4)
        assert row.logp_wrong == pytest.approx(totals["wrong"].mean().item(), abs=1e-4)
        assert row.p_right == pytest.approx(totals["right"].sum().exp().item(), abs=1e-5)
        assert row.success == bool(totals["right"].mean() > totals["wrong"].mean())


def test_batches_change_nothing(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gpt2", torch.float64)
    edits = [random_edit(model, 0), None]
    whole = score(model, CASES, edits).frame
    monkeypatch.setattr("analysis.specificity.ROWS_AT_ONCE", 1)
    pd.testing.assert_frame_equal(whole, score(model, CASES, edits).frame)


def test_interval_is_the_mean_over_texts_and_resamples_cases() -> None:
    frame = pd.DataFrame(
        {"case": ["a"] * 4 + ["b"], "task": "NS", "success": [True] * 4 + [False], "argmax": False, "p_right": 0.5}
    )
    interval = Scores(frame).interval("NS")
    assert (interval.mean, interval.n, interval.n_texts) == (0.8, 2, 5)
    assert (interval.low, interval.high) == (0.0, 1.0)
    with pytest.raises(KeyError, match="no 'success' was measured on a text of 'PS'"):
        Scores(frame).interval("PS")


def test_bootstrap_covers_the_truth() -> None:
    """The 95 % interval holds the true mean in about 95 of 100 draws of cases with correlated texts."""
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        counts = rng.integers(1, 12, size=60).astype(float)
        level = rng.beta(2, 2, size=60)
        low, high = bootstrap(rng.binomial(counts.astype(int), level).astype(float), counts, seed)
        hits += low <= 0.5 <= high
    assert 0.9 <= hits / 200 <= 0.99


def test_results_row_leaves_out_what_is_not_offered(small: TransformerBridge) -> None:
    row = results_row("none", 0.0, 0, score(small, CASES))
    assert list(row)[:4] == ["editor", "gamma", "steps", "ES"] and {"DNS", "DNS_argmax", "DNS_generated"} <= set(row)
    assert not {name for name in row if name.split("_")[0] in ("PS", "NS", "RS", "S", "FL", "CS", "PPL")}
    assert row["ES"]["n"] == 2 and 0 <= row["ES"]["low"] <= row["ES"]["mean"] <= row["ES"]["high"] <= 1


def test_bad_input_is_named(small: TransformerBridge) -> None:
    with pytest.raises(ValueError, match="no cases"):
        score(small, [])
    with pytest.raises(ValueError, match="1 edits were given for 2 cases"):
        score(small, CASES, [None])


def test_cases_of_the_demo_world() -> None:
    world = World.load(demo_folder() / "world.json")
    cases = demo_cases(world, 60, seed=4)
    assert [c.case_id for c in cases] == [c.case_id for c in demo_cases(world, 60, seed=4)]
    assert [c.case_id for c in cases] != [c.case_id for c in demo_cases(world, 60, seed=5)]
    for case in cases:
        request = case.request
        assert set(case.probes) == {"ES", "PS", "NS", "DNS", "RS"}
        assert world.facts[request.subject][case.case_id.split("/")[1]] == request.target_true != request.target_new
        assert all(p.right != request.target_new == p.wrong for t in ("NS", "DNS", "RS") for p in case.probes[t])
        assert all(request.subject not in p.text for p in case.probes["NS"])
        assert all(p.text.startswith(f"{request.question} {request.target_new}. ") for p in case.probes["DNS"])
        used = {w.replace("{}", request.subject) for w in rephrased(world, case).wordings}
        assert len(used) == 2 and not used & {p.text for p in case.probes["PS"]}
    with pytest.raises(ValueError, match="201 cases"):
        demo_cases(world, 201, 0)


def test_world_round_trip_and_shipped_world() -> None:
    shipped = World.load(demo_folder() / "world.json")
    made = make_world(0)
    assert shipped.facts == made.facts and dict(shipped.relations) == made.relations
    assert len(shipped.people) == 200
