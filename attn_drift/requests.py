"""Edit requests: which fact becomes which, in which words. Texts only: nothing here needs a model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from attn_drift.checks import check_list, check_text

SLOT = "{}"


def _check_template(template: str, what: str) -> None:
    check_text(template, what)
    count = template.count(SLOT)
    if count != 1:
        raise ValueError(f"{what} {template!r} has {count} places {SLOT}; expected exactly one")


def _check_words(text: str, name: str, expected: str) -> None:
    check_text(text, name)
    if not text.strip():
        raise ValueError(f"{name} is {text!r}; expected {expected}")


@dataclass(frozen=True)
class EditRequest:
    """One fact to change: (subject s, prompt template, new object o*, old object o).

    Attributes:
        prompt: the question with one ``{}`` where the subject stands; the object follows it after a space.
        subject: the entity that the fact is about.
        target_new: the object that the edited model shall answer.
        target_true: the object before the edit, for scores; None when it is not known.
        rephrasings: further wordings of the question, each with one ``{}``.

    Raises:
        ValueError: a template without exactly one ``{}``, an empty subject or target, equal targets, or anything that
            is not text.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    rephrasings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rephrasings = check_list(self.rephrasings, "rephrasings", "a list of templates, such as ('The {} is',)")
        object.__setattr__(self, "rephrasings", tuple(rephrasings))
        for template in self.wordings:
            _check_template(template, "the prompt")
        _check_words(self.subject, "the subject", "the words that name the edited entity")
        if SLOT in self.subject:
            raise ValueError(f"the subject is {self.subject!r}; expected the words that name the edited entity")
        _check_words(self.target_new, "target_new", "the object that the model shall answer")
        if self.target_true is not None:
            _check_words(self.target_true, "target_true", "the old object, or None where unknown")
        if self.target_true is not None and self.target_new.strip() == self.target_true.strip():
            raise ValueError(
                f"target_new and target_true are both {self.target_new!r}; expected an object that differs from the old"
            )

    @property
    def wordings(self) -> tuple[str, ...]:
        """All templates of the question, the prompt first."""
        return (self.prompt, *self.rephrasings)

    @property
    def question(self) -> str:
        """The prompt with the subject filled in."""
        return fill(self.prompt, self.subject)

    def rephrased(self, *templates: str) -> "EditRequest":
        """The same request with further wordings of its question (method.md, section 4b)."""
        return replace(self, rephrasings=(*self.rephrasings, *templates))


def fill(template: str, text: str) -> str:
    """Puts a text into a template's place; braces within the text stay as they are."""
    return template.replace(SLOT, text, 1)


def check_contexts(contexts: Sequence[str]) -> list[str]:
    """The contexts with the empty one, ``"{}"``, in front.

    Raises:
        ValueError: no list of texts, or a context that does not end in its only ``{}`` (the object follows the prompt).
    """
    contexts = check_list(contexts, "contexts", "a list of templates, such as ['{}', 'In town. {}']")
    for context in contexts:
        _check_template(context, "the context")
        if not context.endswith(SLOT):
            raise ValueError(f"the context {context!r} goes on after {SLOT}; the prompt must come last in it")
    return [SLOT, *(context for context in contexts if context != SLOT)]


def find_subject(text: str, subject: str) -> tuple[int, int]:
    """Characters of the last occurrence of ``subject`` in ``text``: as whole words where there is such a one.

    Args:
        text: where to look.
        subject: what to look for.

    Raises:
        ValueError: the subject is no text, empty, or does not occur.
    """
    _check_words(subject, "the subject", "the words that name the edited entity")
    subject = subject.strip()
    # Looked ahead to, since occurrences may overlap.
    whole_words = list(re.compile(rf"(?<!\w)(?={re.escape(subject)}(?!\w))").finditer(text))
    found = whole_words[-1].start() if whole_words else text.rfind(subject)
    if found < 0:
        raise ValueError(f"the subject {subject!r} does not occur in {text!r}")
    return found, found + len(subject)
