"""Cases: an edit request with the texts that score it (method.md, section 5)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from attn_drift.requests import EditRequest

Task = Literal["ES", "PS", "NS", "DNS", "RS"]
TASKS: tuple[Task, ...] = ("ES", "PS", "NS", "DNS", "RS")


@dataclass(frozen=True)
class Probe:
    """A text, and the two objects that are compared at its end.

    Attributes:
        text: what the model is given.
        right: the object that the edited model should prefer.
        wrong: the object that it should not.
    """

    text: str
    right: str
    wrong: str


@dataclass(frozen=True)
class Case:
    """An edit request and its texts, by task.

    Attributes:
        case_id: distinguishes the cases of a set.
        request: the edit.
        probes: per task its texts; a task that the data do not offer is absent.
    """

    case_id: str
    request: EditRequest
    probes: Mapping[Task, tuple[Probe, ...]]


def distracting(request: EditRequest, probe: Probe) -> Probe:
    """The DNS text of an NS text: the edit as a sentence, then the text."""
    return Probe(f"{request.question} {request.target_new}. {probe.text}", probe.right, probe.wrong)
