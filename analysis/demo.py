"""The demonstration: facts of the demo world edited by ROME, with and without SADR, scored and captured."""

import time
from dataclasses import dataclass
from typing import Any

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from analysis.arms import Arm, arm, subjects
from analysis.drift import AttentionDrift, attention_drift
from analysis.methods import NONE, Supplies
from analysis.scores import results_row
from attn_drift.cases import Case
from attn_drift.demo.cases import demo_cases, rephrased
from attn_drift.demo.world import World
from attn_drift.editors.presets import preset_gamma
from attn_drift.editors.rome import ROMEConfig
from attn_drift.models import demo_folder
from attn_drift.requests import EditRequest
from attn_drift.restriction import SADR

ROME, RESTRICTED, REPHRASED = "rome", "rome+sadr", "rome+sadr+rephrased"

# Of all scores, those of its table.
SHOWN = ("ES", "PS", "NS", "DNS", "RS", "RS_argmax", "DNS_argmax")


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
        # Nothing is restricted, but the heads that would be are recorded.
        (ROME, plain, SADR(gamma=0.0)),
        (RESTRICTED, plain, restriction),
        (REPHRASED, wordings, restriction),
    ]
    supplies = Supplies(model, seed)
    arms = {name: arm(supplies, cases, name, requests, config, restrict) for name, requests, restrict in plans}
    return Demonstration(cases, subjects(cases), arms, config.layer, seed, time.perf_counter() - started)
