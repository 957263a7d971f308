"""Wordings of an edited question, taken from its paraphrases, and the paraphrases that are left to score."""

from collections.abc import Sequence
from dataclasses import replace

from attn_drift.data.cases import Case, Probe
from attn_drift.requests import SLOT, EditRequest, fill

# What ends a sentence: CounterFact puts an unrelated one before each paraphrase.
ENDS = (". ", "? ", "! ", "\n")


def further_wordings(cases: Sequence[Case], most: int = 3) -> list[tuple[str, ...]]:
    """Templates of each case's question beyond its own, from its paraphrases: at most ``most - 1``, as many for each.

    A sentence before that with the subject is no part of a wording. At least one paraphrase in another wording is left
    to score; none are returned where some case has too few.
    """
    found = []
    for case in cases:
        templates = [_template(probe.text, case.request.subject) for probe in case.probes.get("PS", ())]
        usable = dict.fromkeys(t for t in templates if t is not None and t != case.request.prompt)
        chosen = tuple(usable)[: max(0, most - 1)]
        while chosen and not _left(case, chosen):
            chosen = chosen[:-1]
        found.append(chosen)
    least = min(map(len, found))
    return [templates[:least] for templates in found]


def _template(text: str, subject: str) -> str | None:
    """The sentence with the subject, its place marked; None where it is not there once, or holds braces."""
    if text.count(subject) != 1 or "{" in text or "}" in text:
        return None
    before = text[: text.index(subject)]
    start = max(before.rfind(end) + len(end) if end in before else 0 for end in ENDS)
    return text[start:].replace(subject, SLOT)


def without_wordings(case: Case, templates: Sequence[str]) -> Case:
    """The case without the paraphrases that end in a wording which edits use: they would measure what was trained.

    Raises:
        ValueError: none is left.
    """
    left = _left(case, templates)
    if not left:
        raise ValueError(
            f"the case {case.case_id!r} has no paraphrase but those that its edits shall use, {list(templates)}; give "
            "fewer wordings, or a case with more paraphrases"
        )
    return replace(case, probes={**case.probes, "PS": left})


def _left(case: Case, templates: Sequence[str]) -> tuple[Probe, ...]:
    used = tuple(fill(template, case.request.subject) for template in templates)
    return tuple(probe for probe in case.probes["PS"] if not (used and probe.text.endswith(used)))


def worded(case: Case, templates: Sequence[str], n: int) -> EditRequest:
    """The case's request in its own wording and the first ``n - 1`` of some others."""
    return case.request.rephrased(*templates[: n - 1]) if n > 1 else case.request
