"""What an edit does to the model's prose: fluency FL, consistency CS, perplexity PPL (method.md, section 5)."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from transformer_lens.model_bridge import TransformerBridge

from analysis.scoring.generation import GenerationPrompt, check_room
from analysis.scoring.score import check_input
from analysis.scoring.score_and_generate import CompletionQuery, answer, continuations
from analysis.scoring.scores import Scores
from attn_drift.data.cases import Case
from attn_drift.edits.edit import Edit
from attn_drift.model.tokens import Completion, Tokens, encode

LENGTH = 100
# n of the n-grams, and their weights in ROME's fluency.
WEIGHTS = {2: 2 / 3, 3: 4 / 3}


def fluency(text: str) -> float:
    """``100 * (2/3 * H_2 + 4/3 * H_3) / 2``, H_n the entropy in bits of the n-grams of words; 0 for a single word.

    Words are runs of word characters, and single marks of punctuation.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    return 100 * float(np.mean([weight * _entropy(words, n) for n, weight in WEIGHTS.items()]))


def _entropy(words: Sequence[str], n: int) -> float:
    counts = np.array(list(Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()), dtype=np.float64)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


class Consistency:
    """TF-IDF cosine between a model's continuations and reference texts of the new object.

    Args:
        corpus: texts that the document frequencies are taken from: all reference texts of a set.
    """

    def __init__(self, corpus: Iterable[str]) -> None:
        self._vectorizer = TfidfVectorizer().fit(corpus)

    def __call__(self, texts: Sequence[str], references: Sequence[str]) -> float:
        """The cosine of the texts, joined, with the references, joined; 0 where they share no known word."""
        vectors = self._vectorizer.transform([" ".join(texts), " ".join(references)])
        return float((vectors[[0]] @ vectors[[1]].T).sum())


def prose(
    model: TransformerBridge,
    cases: Sequence[Case],
    edits: Sequence[Edit | None] | None = None,
    *,
    seed: int = 0,
    consistency: Consistency | None = None,
) -> Scores:
    """FL of every generation prompt and CS of every case that has references, from the same continuations.

    Continuations have 100 tokens, sampled from the top 5, from seeds that depend on ``seed``, the case and the
    prompt's place in it only: so that editors are compared on the same draws.

    Args:
        model: the model.
        cases: those without generation prompts give no rows.
        edits: an edit for each case; None for the model as it is.
        seed: of the sampling.
        consistency: how references are compared; without it there is no CS.

    Raises:
        ValueError: a number of edits other than that of cases, or a prompt, with its case, that does not fit the
            model's context together with 100 tokens; before the model runs.
    """
    check_input(model, cases, edits)
    openings = [
        GenerationPrompt(edit, _prompt(model, case, place), LENGTH, _seed(seed, case.case_id, place))
        for case, edit in zip(cases, [None] * len(cases) if edits is None else edits, strict=True)
        for place in range(len(case.generation))
    ]
    texts = continuations(model, openings) if openings else []
    ends = list(accumulate((len(case.generation) for case in cases), initial=0))
    rows: list[dict[str, Any]] = []
    for case, (start, stop) in zip(cases, pairwise(ends), strict=True):
        told = texts[start:stop]
        for prompt, text in zip(case.generation, told, strict=True):
            row = {"case": case.case_id, "task": "FL", "text": prompt, "continuation": text, "value": fluency(text)}
            rows.append(row)
        if told and case.references and consistency is not None:
            rows.append({"case": case.case_id, "task": "CS", "value": consistency(told, case.references)})
    return Scores.from_rows(rows)


def _seed(seed: int, case_id: str, place: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {place} {case_id}".encode()).digest()[:7])


def _prompt(model: TransformerBridge, case: Case, place: int) -> Tokens:
    try:
        return check_prompt(model, case.generation[place])
    except ValueError as error:
        raise ValueError(f"a prompt of the case {case.case_id!r} cannot be continued: {error}") from error


def check_prompt(model: TransformerBridge, prompt: str) -> Tokens:
    """Tokenizes a prompt; raises a ValueError for one that does not fit the model's context with its continuation."""
    tokens = encode(model, prompt)
    check_room(model, tokens, LENGTH)
    return tokens


def predicted(model: TransformerBridge, texts: Sequence[str]) -> list[Completion]:
    """The texts of `perplexity`, tokenized: everything but the first token is predicted.

    Raises:
        ValueError: a single text instead of several, one of fewer than two tokens, or longer than the model's context.
    """
    if isinstance(texts, str):
        raise ValueError(f"the texts for perplexity are the text {texts[:60]!r}; expected a list of texts")
    completions = []
    for text in texts:
        tokens = encode(model, text)
        if len(tokens) < 2:
            raise ValueError(f"the text {text!r} has a single token; perplexity needs at least two")
        completions.append(Completion(tokens.head(len(tokens) - 1), 0, tokens.ids[1:]))
    return completions


def perplexity(
    model: TransformerBridge,
    cases: Sequence[Case],
    edits: Sequence[Edit | None] | None,
    texts: Sequence[str],
) -> Scores:
    """The loss of each text under each case's edit: ``value`` is the mean NLL of its N - 1 predicted tokens.

    The reported PPL is the exponential of the mean over all predicted tokens of all texts.

    Raises:
        ValueError: a number of edits other than that of cases, or as of `predicted`.
    """
    check_input(model, cases, edits)
    completions = predicted(model, texts)
    per_case = [None] * len(cases) if edits is None else list(edits)
    answers = answer(model, [CompletionQuery(edit, completion) for edit in per_case for completion in completions])
    rows = [
        {
            "case": case.case_id,
            "task": "PPL",
            "text": text,
            "value": -answered.log_probs.mean().item(),
            "weight": len(answered.log_probs),
        }
        for (case, text), answered in zip(((c, t) for c in cases for t in texts), answers, strict=True)
    ]
    return Scores.from_rows(rows)
