"""The demonstration: facts of the demo world edited by ROME, with and without SADR, scored and captured."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from analysis.drift import AttentionDrift, SubjectAttention, attention_drift, subject_attention
from analysis.methods import NONE
from analysis.scores import Scores, results_row
from analysis.specificity import score
from attn_drift.attention import AttentionCapture, capture_attention
from attn_drift.cases import Case
from attn_drift.demo.cases import demo_cases, rephrased
from attn_drift.demo.world import World
from attn_drift.editors.presets import preset_gamma
from attn_drift.editors.rome import ROMEConfig, rome
from attn_drift.edits import Edit
from attn_drift.models import demo_folder
from attn_drift.requests import EditRequest
from attn_drift.restriction import SADR

ROME, RESTRICTED, REPHRASED = "rome", "rome+sadr", "rome+sadr+rephrased"

# Of all scores, those of its table.
SHOWN = ("ES", "PS", "NS", "DNS", "RS", "RS_argmax", "DNS_argmax")


@dataclass(frozen=True, eq=False)
class Arm:
    """One editor's edits of all cases, their scores, and the attention on the DNS texts.

    Attributes:
        editor: its name.
        gamma, steps: its settings; 0 where it has none.
        edits: one per case; None for the unedited model.
        scores: of all cases.
        capture: patterns of all heads on the DNS texts.
        attention: from the last token of each DNS text to the edited subject.
    """

    editor: str
    gamma: float
    steps: int
    edits: list[Edit] | None
    scores: Scores
    capture: AttentionCapture
    attention: SubjectAttention


@dataclass(frozen=True, eq=False, repr=False)
class Demonstration:
    """All arms on the same cases.

    Attributes:
        cases: the edited facts.
        subjects: the edited subject of each DNS text.
        arms: by editor, the unedited model first.
        layer: the edited layer.
        seed: of cases and contexts.
        seconds: that everything took.
    """

    cases: list[Case]
    subjects: list[str]
    arms: dict[str, Arm]
    layer: int
    seed: int
    seconds: float

    def __repr__(self) -> str:
        return f"Demonstration({len(self.cases)} facts, editors {list(self.arms)}, seed {self.seed})"

    def max_head(self, editor: str) -> float:
        """Attention to the subject, maximum over the heads above the edit, averaged over the DNS texts."""
        return self.arms[editor].attention.max_head(self.layer).mean().item()

    def drift(self, editor: str) -> AttentionDrift:
        """The drift that an editor causes on the DNS texts."""
        return attention_drift(self.arms[NONE].capture, self.arms[editor].capture, self.subjects)

    def to_json(self) -> dict[str, Any]:
        """What ``results.json`` holds."""
        return {
            "model": "demo",
            "n_cases": len(self.cases),
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "rows": [results_row(arm.editor, arm.gamma, arm.steps, arm.scores) for arm in self.arms.values()],
            "drift": {editor: {"max_head": self.max_head(editor)} for editor in self.arms},
        }

    def table(self) -> pd.DataFrame:
        """The scores in percent, and ``max head``, one row per editor."""
        rows = self.to_json()["rows"]
        table = pd.DataFrame({"gamma": [row["gamma"] for row in rows]}, index=[row["editor"] for row in rows])
        table.index.name = "editor"
        for name in SHOWN:
            table[name.replace("_", " ")] = [100 * row[name]["mean"] for row in rows]
        table["max head"] = [self.max_head(editor) for editor in table.index]
        return table


def demonstrate(model: TransformerBridge, n: int = 24, gamma: float | None = None, seed: int = 0) -> Demonstration:
    """Edits ``n`` facts with none, ROME, ROME + SADR, and ROME + SADR with two wordings.

    All at the same number of steps and texts. The wording that the last adds is in no score.

    Args:
        model: the demo model.
        n: number of facts, at most that of the world's people.
        gamma: SADR's weight; the model's preset when None.
        seed: of the cases and of the edits' contexts.
    """
    started = time.perf_counter()
    world = World.load(demo_folder() / "world.json")
    cases = demo_cases(world, n, seed)
    config = ROMEConfig.for_model(model)
    restriction = SADR(gamma=preset_gamma("rome", model, config.layer) if gamma is None else gamma)
    plain = [case.request for case in cases]
    wordings = [rephrased(world, case) for case in cases]
    plans: list[tuple[str, list[EditRequest] | None, SADR | None]] = [
        (NONE, None, None),
        (ROME, plain, None),
        (RESTRICTED, plain, restriction),
        (REPHRASED, wordings, restriction),
    ]
    arms = {name: _arm(model, cases, name, requests, restrict, config, seed) for name, requests, restrict in plans}
    return Demonstration(cases, _subjects(cases), arms, config.layer, seed, time.perf_counter() - started)


def _arm(
    model: TransformerBridge,
    cases: Sequence[Case],
    name: str,
    requests: list[EditRequest] | None,
    restrict: SADR | None,
    config: ROMEConfig,
    seed: int,
) -> Arm:
    edits = None
    if requests is not None:
        generator = torch.Generator().manual_seed(seed)
        edits = rome(model, requests, config=config, restrict=restrict, generator=generator)
    texts = [probe.text for case in cases for probe in case.probes["DNS"]]
    per_text = None if edits is None else [e for e, c in zip(edits, cases, strict=True) for _ in c.probes["DNS"]]
    capture = capture_attention(model, texts, edits=per_text)
    return Arm(
        editor=name,
        gamma=0.0 if restrict is None else restrict.gamma,
        steps=0 if edits is None else config.steps,
        edits=edits,
        scores=score(model, cases, edits),
        capture=capture,
        attention=subject_attention(capture, _subjects(cases)),
    )


def _subjects(cases: Sequence[Case]) -> list[str]:
    return [case.request.subject for case in cases for _ in case.probes["DNS"]]
