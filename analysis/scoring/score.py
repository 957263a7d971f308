"""Scores of an edit on the texts of its case (method.md, section 5).

Every text is scored in four ways: pairwise (the mean log-probability per token of the right object exceeds that of the
wrong one), by argmax with the right tokens before each given, by what the model says when it runs freely, and by the
probabilities of both objects.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from analysis.scoring.generation import GenerationPrompt, check_room
from analysis.scoring.score_and_generate import CompletionQuery, CompletionScore, score_and_generate
from analysis.scoring.scores import Scores
from attn_drift.data.cases import TASKS, Case, Probe, Task
from attn_drift.edits.edit import Edit
from attn_drift.model.loading import check_model
from attn_drift.model.tokens import encode_completion

# Their objects are whole sentences, given to choose from: nobody expects a model to say them freely.
CHOICES: tuple[Task, ...] = ("commonsense", "distracted_commonsense")

# Scripts in which no space follows a word, as ranges of characters: Thai to Tibetan, Khmer, Japanese, Chinese, Korean
# (whose particles follow without one).
UNSPACED = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"

# A free answer may spell the right object in more tokens than the tokenizer does, and must end it.
SPARE_TOKENS = 2


def score(model: TransformerBridge, cases: Sequence[Case], edits: Sequence[Edit | None] | None = None) -> Scores:
    """Scores every text of every case: pairwise, by argmax, by a free answer, and by probabilities.

    Args:
        model: the model.
        cases: what to score.
        edits: an edit for each case; None for the model as it is. Edits are applied per row by hooks, so that texts
            of different edits share batches.

    Raises:
        ValueError: no cases, a number of edits other than that of cases, or a text that cannot be scored, with its
            case and task; before the model runs (`drop_unfit_texts` leaves such texts out).
    """
    check_input(model, cases, edits)
    if not cases:
        raise ValueError("no cases were given; expected at least one")
    probes = [
        (case.case_id, task, probe, edit)
        for case, edit in zip(cases, [None] * len(cases) if edits is None else edits, strict=True)
        for task in TASKS
        for probe in case.probes.get(task, ())
    ]
    asked = [_asked(model, *given) for given in probes]
    questions = [question for a in asked for question in (a.right, a.wrong) if question is not None]
    found, said = score_and_generate(model, questions, [a.opening for a in asked if a.opening is not None])
    answers, told = iter(found), iter(said)
    rows = [
        {"case": case_id, "task": task, "text": probe.text, "right": probe.right, "wrong": probe.wrong}
        | _measures(probe, next(answers), None if a.wrong is None else next(answers))
        | ({} if a.opening is None else _free_answer(probe, next(told)))
        for (case_id, task, probe, _), a in zip(probes, asked, strict=True)
    ]
    return Scores.from_rows(rows)


def check_input(model: TransformerBridge, cases: Sequence[Case], edits: Sequence[Edit | None] | None) -> None:
    """Raises a ValueError when the model, the number of edits, or the cases' ids (not unique) do not allow scoring."""
    check_model(model)
    if len({case.case_id for case in cases}) < len(cases):
        raise ValueError(f"{len(cases)} cases were given, not all with an id of their own; texts are grouped by it")
    if edits is not None and len(edits) != len(cases):
        raise ValueError(f"{len(edits)} edits were given for {len(cases)} cases; expected one for each")


def check_texts(model: TransformerBridge, case: Case) -> None:
    """Raises a ValueError for a text of a case that cannot be scored, see `check_text`."""
    for task, probes in case.probes.items():
        for probe in probes:
            _asked(model, case.case_id, task, probe, None)


def check_text(model: TransformerBridge, task: Task, probe: Probe) -> None:
    """Raises a ValueError for a text that cannot be scored: too long, with its objects or a free answer, or merged."""
    _Asked.of(model, task, probe, None)


def _asked(model: TransformerBridge, case_id: str, task: Task, probe: Probe, edit: Edit | None) -> "_Asked":
    try:
        return _Asked.of(model, task, probe, edit)
    except ValueError as error:
        raise ValueError(f"a {task} text of the case {case_id!r} cannot be scored: {error}") from error


@dataclass(frozen=True, eq=False)
class _Asked:
    """What the model is asked about a probe; making it raises a ValueError for one that cannot be scored."""

    right: CompletionQuery
    wrong: CompletionQuery | None
    opening: GenerationPrompt | None

    @classmethod
    def of(cls, model: TransformerBridge, task: Task, probe: Probe, edit: Edit | None) -> "_Asked":
        right = encode_completion(model, probe.text, probe.right)
        wrong = (
            None if probe.wrong is None else CompletionQuery(edit, encode_completion(model, probe.text, probe.wrong))
        )
        if task in CHOICES:
            return cls(CompletionQuery(edit, right), wrong, None)
        accepted = [right, *(encode_completion(model, probe.text, alias) for alias in probe.aliases)]
        length = max(len(completion.target) for completion in accepted) + SPARE_TOKENS
        opening = GenerationPrompt(edit, right.tokens.head(right.prompt_last + 1), length)
        check_room(model, opening.tokens, opening.length)
        return cls(CompletionQuery(edit, right), wrong, opening)


def _measures(probe: Probe, right: CompletionScore, wrong: CompletionScore | None) -> dict[str, Any]:
    logp_right = right.log_probs.mean().item()
    measures = {
        "logp_right": logp_right,
        "p_right": right.log_probs.sum().exp().item(),
        "argmax": bool(right.first_choice.all()),
    }
    if wrong is None:
        return measures
    logp_wrong = wrong.log_probs.mean().item()
    return measures | {
        "logp_wrong": logp_wrong,
        "p_wrong": wrong.log_probs.sum().exp().item(),
        "success": logp_right > logp_wrong,
    }


def _free_answer(probe: Probe, continuation: str) -> dict[str, Any]:
    right = any(begins(continuation, accepted) for accepted in (probe.right, *probe.aliases))
    return {"continuation": continuation, "generated": right}


def begins(continuation: str, answer: str) -> bool:
    """Whether a text begins with an answer, up to case and white space, and a word ends where it ends."""
    words = r"\s+".join(re.escape(word) for word in answer.split())
    end = "" if re.search(rf"[{UNSPACED}]$", answer.strip()) else r"(?!\w)"
    return re.match(rf"\s*{words}{end}", continuation, re.IGNORECASE) is not None
