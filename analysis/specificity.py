"""Scores of an edit: ES, PS, NS, DNS, RS (method.md, section 5), pairwise, by argmax, and as probabilities.

A text succeeds when the mean log-probability per token of the right object exceeds that of the wrong one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.cases import TASKS, Case
from attn_drift.edits import Edit, applied_to_rows
from attn_drift.hooks import run
from attn_drift.models import check_model
from attn_drift.tokens import Completion, Tokens, encode_completion, pad

ROWS_AT_ONCE = 256
LOGITS_AT_ONCE = 2**26
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean with a 95 % interval from a bootstrap over cases, since texts of one case are not independent.

    Attributes:
        mean: over all texts.
        low, high: the interval's ends.
        n: number of cases.
        n_texts: number of texts.
    """

    mean: float
    low: float
    high: float
    n: int
    n_texts: int


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """One row per text.

    Columns of ``frame``: ``case``, ``task``, ``text``, ``right``, ``wrong``; ``logp_right``, ``logp_wrong`` (mean
    log-probability per token), ``p_right``, ``p_wrong`` (probability of the whole object), ``success`` (right above
    wrong), ``argmax`` (every token of the right object is the model's first choice, the right ones before it given).
    """

    frame: pd.DataFrame

    def __repr__(self) -> str:
        return f"Scores({self.frame['case'].nunique()} cases, {len(self.frame)} texts)"

    def interval(self, task: str, column: str = "success", seed: int = 0) -> Interval:
        """Mean of a column over the texts of a task, with its interval.

        Raises:
            KeyError: no text of that task was scored.
        """
        texts = self.frame[self.frame["task"] == task]
        if texts.empty:
            raise KeyError(f"no text of the task {task!r} was scored; there are {sorted(self.frame['task'].unique())}")
        grouped = texts.groupby("case", sort=False)[column]
        low, high = bootstrap(grouped.sum().to_numpy(), grouped.count().to_numpy(), seed)
        return Interval(float(texts[column].mean()), low, high, grouped.ngroups, len(texts))

    def summary(self) -> pd.DataFrame:
        """Per task the mean and interval of ``success``, and the means of the other measures."""
        rows: list[dict[str, Any]] = []
        for task in TASKS:
            texts = self.frame[self.frame["task"] == task]
            if texts.empty:
                continue
            interval = self.interval(task)
            rows.append(
                {
                    "task": task,
                    "mean": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                    "argmax": texts["argmax"].mean(),
                    "p_right": texts["p_right"].mean(),
                    "p_wrong": texts["p_wrong"].mean(),
                    "n": interval.n,
                    "n_texts": interval.n_texts,
                }
            )
        return pd.DataFrame(rows).set_index("task")


def bootstrap(totals: NDArray[Any], counts: NDArray[Any], seed: int) -> tuple[float, float]:
    """95 % percentile interval of ``sum(totals) / sum(counts)`` when cases are drawn with replacement."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(totals), size=(RESAMPLES, len(totals)))
    means = totals[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def score(model: TransformerBridge, cases: Sequence[Case], edits: Sequence[Edit | None] | None = None) -> Scores:
    """Scores every text of every case.

    Args:
        model: the model.
        cases: what to score.
        edits: an edit for each case; None for the model as it is. Edits are applied per row by hooks, so that texts
            of different edits share batches.

    Raises:
        ValueError: no cases, a number of edits other than that of cases, or a text longer than the context.
    """
    check_model(model)
    if not cases:
        raise ValueError("no cases were given; expected at least one")
    if edits is not None and len(edits) != len(cases):
        raise ValueError(f"{len(edits)} edits were given for {len(cases)} cases; expected one for each")
    probes = [
        (index, task, probe)
        for index, case in enumerate(cases)
        for task in TASKS
        for probe in case.probes.get(task, ())
    ]
    questions = [
        Question(None if edits is None else edits[index], encode_completion(model, probe.text, target))
        for index, _, probe in probes
        for target in (probe.right, probe.wrong)
    ]
    answers = answer(model, questions)
    rows = []
    for i, (index, task, probe) in enumerate(probes):
        right, wrong = answers[2 * i], answers[2 * i + 1]
        rows.append(
            {
                "case": cases[index].case_id,
                "task": task,
                "text": probe.text,
                "right": probe.right,
                "wrong": probe.wrong,
                "logp_right": right.log_probs.mean().item(),
                "logp_wrong": wrong.log_probs.mean().item(),
                "p_right": right.log_probs.sum().exp().item(),
                "p_wrong": wrong.log_probs.sum().exp().item(),
                "success": bool(right.log_probs.mean() > wrong.log_probs.mean()),
                "argmax": bool(right.first_choice.all()),
            }
        )
    return Scores(pd.DataFrame(rows))


@dataclass(frozen=True, eq=False)
class Question:
    """A completion, asked of the model under an edit (None: as it is)."""

    edit: Edit | None
    completion: Completion


@dataclass(frozen=True, eq=False)
class Answer:
    """What the model gave the tokens of a completion.

    Attributes:
        log_probs: of each target token, those before it given.
        first_choice: whether each is the model's first choice.
    """

    log_probs: Float[Tensor, " target"]
    first_choice: Bool[Tensor, " target"]


def answer(model: TransformerBridge, questions: Sequence[Question]) -> list[Answer]:
    """Teacher-forced log-probabilities of many completions, each under its own edit.

    Completions that give the model the same tokens under the same edit (one-token objects after one text) share a row.
    """
    shared: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for index, question in enumerate(questions):
        shared.setdefault((id(question.edit), question.completion.tokens.ids), []).append(index)
    answers: dict[int, Answer] = {}
    with torch.no_grad(), tqdm(total=len(shared), desc="scoring", leave=False) as progress:
        for group in _groups(model, list(shared.values()), questions):
            rows: list[Tokens] = [questions[members[0]].completion.tokens for members in group]
            batch = pad(model, rows)
            with applied_to_rows(model, [questions[members[0]].edit for members in group]):
                logits = run(model, batch)
            for row, members in enumerate(group):
                start = int(batch.starts[row])
                for index in members:
                    completion = questions[index].completion
                    answers[index] = _answer(logits[row, start : start + len(rows[row])], completion)
            progress.update(len(group))
    return [answers[index] for index in range(len(questions))]


def _answer(logits: Float[Tensor, "pos vocab"], completion: Completion) -> Answer:
    target = torch.tensor(completion.target, device=logits.device)
    at_target = logits[completion.prompt_last :]
    at_target = at_target.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = at_target.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    return Answer(log_probs.cpu(), (at_target.argmax(-1) == target).cpu())


def _groups(
    model: TransformerBridge, rows: list[list[int]], questions: Sequence[Question]
) -> Iterator[list[list[int]]]:
    """Rows of like length together, in batches of bounded size."""

    def length(members: list[int]) -> int:
        return len(questions[members[0]].completion.tokens)

    group: list[list[int]] = []
    for members in sorted(rows, key=length):
        full = (len(group) + 1) * length(members) * model.cfg.d_vocab > LOGITS_AT_ONCE
        if group and (full or len(group) == ROWS_AT_ONCE):
            yield group
            group = []
        group.append(members)
    yield group


def results_row(editor: str, gamma: float, steps: int, scores: Scores) -> dict[str, Any]:
    """A row of a results file: the editor, and the interval of every score that the cases offer, as fractions."""
    row: dict[str, Any] = {"editor": editor, "gamma": gamma, "steps": steps}
    present = set(scores.frame["task"])
    columns = {task: (task, "success") for task in TASKS} | {f"{t}_argmax": (t, "argmax") for t in ("RS", "DNS")}
    for name, (task, column) in columns.items():
        if task in present:
            interval = scores.interval(task, column)
            row[name] = {"mean": interval.mean, "low": interval.low, "high": interval.high, "n": interval.n}
    return row
