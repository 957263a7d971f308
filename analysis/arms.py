"""An arm of a comparison: all cases edited in one way, their scores, and the attention to the subject."""

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.drift import SubjectAttention, subject_attention
from analysis.methods import Supplies
from analysis.scores import Scores
from analysis.specificity import score
from attn_drift.attention import AttentionCapture, capture_attention
from attn_drift.cases import Case
from attn_drift.editors.rome import ROMEConfig, rome
from attn_drift.edits import Edit
from attn_drift.requests import EditRequest
from attn_drift.restriction import Restriction


@dataclass(frozen=True, eq=False, repr=False)
class Arm:
    """One editor's edits of all cases.

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

    def __repr__(self) -> str:
        return f"Arm({self.editor!r}, {self.scores!r})"


def subjects(cases: Sequence[Case]) -> list[str]:
    """The edited subject of every DNS text."""
    return [case.request.subject for case in cases for _ in case.probes["DNS"]]


def arm(
    supplies: Supplies,
    cases: Sequence[Case],
    editor: str,
    requests: Sequence[EditRequest] | None,
    config: ROMEConfig,
    restrict: Restriction | None = None,
) -> Arm:
    """Edits, scores and captures.

    Args:
        supplies: the model, with contexts and second moments.
        cases: what is scored; each has DNS texts.
        editor: the arm's name.
        requests: one per case; None for the unedited model.
        config: ROME's settings.
        restrict: a loss term, for instance SADR.
    """
    edits = None
    if requests is not None:
        contexts, moment = supplies.contexts(config.context_lengths), supplies.moment(config.layer)
        edits = rome(supplies.model, requests, config=config, contexts=contexts, moment=moment, restrict=restrict)
    texts = [probe.text for case in cases for probe in case.probes["DNS"]]
    per_text = None if edits is None else [e for e, c in zip(edits, cases, strict=True) for _ in c.probes["DNS"]]
    capture = capture_attention(supplies.model, texts, edits=per_text)
    return Arm(
        editor=editor,
        gamma=getattr(restrict, "gamma", 0.0),
        steps=0 if edits is None else config.steps,
        edits=edits,
        scores=score(supplies.model, cases, edits),
        capture=capture,
        attention=subject_attention(capture, subjects(cases)),
    )
