"""Edit requests: which fact becomes which, in which words. Texts only: nothing here needs a model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

SLOT = "{}"


def _check_template(template: str, what: str) -> None:
    count = template.count(SLOT)
    if count != 1:
        raise ValueError(f"{what} {template!r} has {count} places {SLOT}; expected exactly one")


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
        ValueError: a template without exactly one ``{}``, an empty subject or target, equal targets.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    rephrasings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rephrasings", tuple(self.rephrasings))
        for template in self.wordings:
            _check_template(template, "the prompt")
        if not self.subject.strip() or SLOT in self.subject:
            raise ValueError(f"the subject is {self.subject!r}; expected the words that name the edited entity")
        if not self.target_new.strip():
            raise ValueError(f"target_new is {self.target_new!r}; expected the object that the model shall answer")
        if self.target_true is not None and not self.target_true.strip():
            raise ValueError(f"target_true is {self.target_true!r}; expected the old object, or None where unknown")
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
        ValueError: a context that does not end in its only ``{}`` (the object follows the prompt).
    """
    if isinstance(contexts, str):
        raise ValueError(f"contexts is the text {contexts!r}; expected a sequence of templates")
    for context in contexts:
        _check_template(context, "the context")
        if not context.endswith(SLOT):
            raise ValueError(f"the context {context!r} goes on after {SLOT}; the prompt must come last in it")
    return [SLOT, *(context for context in contexts if context != SLOT)]


def find_subject(text: str, subject: str, start: int = 0) -> tuple[int, int]:
    """Characters of the last occurrence of ``subject`` in ``text``: as whole words where there is such a one.

    Args:
        text: where to look.
        subject: what to look for.
        start: the first character at which an occurrence counts.

    Raises:
        ValueError: the subject is empty or does not occur.
    """
    if not subject.strip():
        raise ValueError(f"the subject is empty ({subject!r}); expected the words that name the edited entity")
    subject = subject.strip()
    # Looked ahead to, since occurrences may overlap.
    whole_words = list(re.compile(rf"(?<!\w)(?={re.escape(subject)}(?!\w))").finditer(text, start))
    found = whole_words[-1].start() if whole_words else text.rfind(subject, start)
    if found < 0:
        raise ValueError(f"the subject {subject!r} does not occur in {text!r}")
    return found, found + len(subject)
