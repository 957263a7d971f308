"""Records of case files, one model per format, and the case that each makes (method.md, section 5).

Records are untrusted: every field that is used is checked, nothing is converted, and what is not used is ignored. A
null is the same as a missing field. What is wrong is said with the path of its field.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from attn_drift.data.cases import TASKS, Case, Probe, Task, distracting
from attn_drift.requests import SLOT, EditRequest, find_subject

TABLE_METRICS = 400
LONGEST_ID = 200

_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
_EXPECTED = {"string_type": "a text", "list_type": "a list", "model_type": "an object"}

# Which texts are also given after the edit as a sentence.
_DISTRACTED: dict[Task, Task] = {"NS": "DNS", "commonsense": "distracted_commonsense"}


class RecordError(ValueError):
    """A record that makes no case: the path of a field, and what is wrong with it.

    Attributes:
        omitted: the format itself says that such records are left out.
    """

    def __init__(self, field: str, problem: str, omitted: bool = False) -> None:
        super().__init__(shortened(f"{field}: {problem}" if field else problem))
        self.omitted = omitted


def shortened(text: str, length: int = TABLE_METRICS) -> str:
    """A text of any length, for messages."""
    return text if len(text) <= length else f"{text[:length]} ..."


def kind(value: object) -> str:
    """What a value is in JSON, for messages: the value itself may be of any size."""
    return _KINDS.get(type(value), "a number")


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is a surrogate without its partner; expected Unicode") from None
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError(f"{text[:20]!r}; expected a text with visible characters")
    return text


def _without_slot(subject: str) -> str:
    if SLOT in subject:
        raise ValueError(f"{subject!r}; expected the words that name the edited entity")
    return subject


def _with_one_slot(template: str) -> str:
    count = template.count(SLOT)
    if count != 1:
        raise ValueError(f"{count} places {SLOT} for the subject; expected exactly one")
    return template


# ``info`` is a ValidationInfo, a protocol that cannot be checked at run time.
def _templated(prompt: str, info: Any) -> str:
    """Puts the place of the subject where it occurs last (it may occur before); needs ``subject`` checked before."""
    if SLOT in prompt or "subject" not in info.data:
        return prompt
    start, stop = find_subject(prompt, info.data["subject"])
    return prompt[:start] + SLOT + prompt[stop:]


def _of_one(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _flat(value: Any) -> Any:
    if not isinstance(value, list):
        return _as_list(value)
    return [name for part in value for name in (part if isinstance(part, list) else [part])]


def _distinct(names: list[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if name.strip()]


def _short(identity: str) -> str:
    if len(identity) > LONGEST_ID:
        raise ValueError(f"{len(identity)} characters; expected at most {LONGEST_ID}")
    return identity


def _as_identity(value: Any) -> Any:
    return str(value) if type(value) is int else value


Whole = Annotated[str, AfterValidator(_whole)]
Text = Annotated[Whole, AfterValidator(_not_blank)]
Subject = Annotated[Text, AfterValidator(str.strip), AfterValidator(_without_slot)]
# With the place of the subject, or with the subject, which gives way to the place; declared after ``subject``.
Template = Annotated[Text, AfterValidator(_with_one_slot)]
CompletionQuery = Annotated[Text, AfterValidator(_templated), AfterValidator(_with_one_slot)]
OneText = Annotated[Text, BeforeValidator(_of_one)]
Element = TypeVar("Element")
# Of a long list of wrong values the first one is enough: an error per value would fill the memory.
Many = Annotated[list[Element], FailFast()]
Texts = Annotated[Many[Text], BeforeValidator(_as_list)]
# Names of one object, the first of them the usual one: given as a text, a list or a list of lists.
Names = Annotated[Many[Whole], BeforeValidator(_flat), AfterValidator(_distinct)]
Identity = Annotated[Text, AfterValidator(_short), BeforeValidator(_as_identity)]


class Part(BaseModel):
    """What every part of a record has in common."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_missing(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


Model = TypeVar("Model", bound=Part)


def checked(model: type[Model], item: object) -> Model:
    """A part of a record from what was read.

    Raises:
        RecordError: something is missing, or is not what the model expects.
    """
    try:
        return model.model_validate(item)
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
        cause = error.get("ctx", {}).get("error")
        if error["type"] in _EXPECTED:
            problem = f"{kind(error['input'])}; expected {_EXPECTED[error['type']]}"
        elif error["type"] == "missing":
            problem = "missing"
        else:
            problem = error["msg"] if cause is None else str(cause)
        raise RecordError(".".join(map(str, error["loc"])), problem, error["type"] == "omitted") from None


class Record(Part):
    """A record that makes a case.

    Attributes:
        keys: a record with these is taken for one of this format.
        new_object: the path of the field with the new object.
        case_id: distinguishes the records of a file; None where it has none.
    """

    keys: ClassVar[frozenset[str]]
    new_object: ClassVar[str]

    case_id: Identity | None = None

    @abstractmethod
    def request(self) -> EditRequest:
        """The edit that the record asks for."""

    @abstractmethod
    def probes(self, request: EditRequest) -> dict[Task, list[Probe]]:
        """The texts that the record brings, by task; a list may be empty."""

    @property
    def openings(self) -> Sequence[str]:
        """Openings about the subject for the model to continue."""
        return ()

    @property
    def object_ids(self) -> tuple[str | None, str | None]:
        """Identities of the relation and of the new object; None where they are not known."""
        return None, None

    def case(self, index: int) -> Case:
        """The case; the record's index in its file stands in for a missing ``case_id``.

        Raises:
            RecordError: the record asks for no change.
        """
        try:
            request = self.request()
        except ValueError as error:  # all else was checked before
            raise RecordError(self.new_object, str(error)) from None
        probes = self.probes(request)
        for task, distracted in _DISTRACTED.items():
            probes[distracted] = [distracting(request, probe) for probe in probes.get(task, ())]
        return Case(
            case_id=str(index) if self.case_id is None else self.case_id,
            request=request,
            probes={task: tuple(probes[task]) for task in TASKS if probes.get(task)},
            generation=tuple(self.openings),
        )


def _probe(text: str, right: str, wrong: str | None, aliases: Sequence[str] = ()) -> Probe:
    same = wrong is not None and wrong.strip() == right.strip()
    return Probe(text, right, None if same else wrong, tuple(aliases))


def _probes(texts: Sequence[str], right: str, wrong: str | None) -> list[Probe]:
    return [_probe(text, right, wrong) for text in texts]


class _Prompted(Part):
    prompts: Many[Text] = []
    targets: Many[Text] = []

    @model_validator(mode="after")
    def _equally_many(self) -> "_Prompted":
        if len(self.prompts) != len(self.targets):
            raise ValueError(
                f"{len(self.prompts)} prompts and {len(self.targets)} targets; expected as many of one as of the other"
            )
        return self

    def probes(self, wrong: str | None) -> list[Probe]:
        return [_probe(text, right, wrong) for text, right in zip(self.prompts, self.targets, strict=True)]


class _Openings(Part):
    prompts: Many[Text] = []


class _Choice(Part):
    prompts: Text
    right: Text
    wrong: Text


class _MergedRewrite(Part):
    subject: Subject
    prompt: CompletionQuery
    target_new: Text
    target_true: Text | None = None
    relation_id: Text | None = None
    target_new_id: Text | None = None


class MergedRecord(Record):
    """A record of the merged CounterFact and WikiData set."""

    keys: ClassVar[frozenset[str]] = frozenset({"requested_rewrite", "rewrite"})
    new_object: ClassVar[str] = "requested_rewrite.target_new"

    requested_rewrite: _MergedRewrite
    rewrite: _Prompted = _Prompted()
    paraphrase: _Prompted = Field(default=_Prompted(), alias="p-paraphrase")
    subject_alias: _Prompted = Field(default=_Prompted(), alias="p-subject_alias")
    reasoning: _Prompted = Field(default=_Prompted(), alias="p-reasoning")
    neighbor: _Prompted = Field(default=_Prompted(), alias="l-neighbor")
    relation: _Prompted = Field(default=_Prompted(), alias="l-relation")
    generation: _Openings = _Openings()
    commonsense: _Choice | None = Field(default=None, alias="o-commonsense")

    def request(self) -> EditRequest:
        asked = self.requested_rewrite
        return EditRequest(asked.prompt, asked.subject, asked.target_new, asked.target_true)

    def probes(self, request: EditRequest) -> dict[Task, list[Probe]]:
        new, true, choice = request.target_new, request.target_true, self.commonsense
        return {
            "ES": self.rewrite.probes(true) or [_probe(request.question, new, true)],
            "PS": self.paraphrase.probes(true),
            "NS": self.neighbor.probes(new),
            "RS": self.relation.probes(new),
            "alias": self.subject_alias.probes(true),
            "reasoning": self.reasoning.probes(true),
            "commonsense": [_probe(choice.prompts, choice.right, choice.wrong)] if choice else [],
        }

    @property
    def openings(self) -> Sequence[str]:
        return self.generation.prompts

    @property
    def object_ids(self) -> tuple[str | None, str | None]:
        return self.requested_rewrite.relation_id, self.requested_rewrite.target_new_id


class _Object(Part):
    name: Text = Field(alias="str")
    id: Text | None = None


class _CounterFactRewrite(Part):
    subject: Subject
    prompt: Template
    target_new: _Object
    target_true: _Object
    relation_id: Text | None = None


class CounterFactRecord(Record):
    """A record of CounterFact, as ROME published it."""

    keys: ClassVar[frozenset[str]] = frozenset({"requested_rewrite"})
    new_object: ClassVar[str] = "requested_rewrite.target_new.str"

    requested_rewrite: _CounterFactRewrite
    paraphrase_prompts: Many[Text] = []
    neighborhood_prompts: Many[Text] = []
    generation_prompts: Many[Text] = []

    def request(self) -> EditRequest:
        asked = self.requested_rewrite
        return EditRequest(asked.prompt, asked.subject, asked.target_new.name, asked.target_true.name)

    def probes(self, request: EditRequest) -> dict[Task, list[Probe]]:
        new, true = request.target_new, self.requested_rewrite.target_true.name
        return {
            "ES": [_probe(request.question, new, true)],
            "PS": _probes(self.paraphrase_prompts, new, true),
            "NS": _probes(self.neighborhood_prompts, true, new),
        }

    @property
    def openings(self) -> Sequence[str]:
        return self.generation_prompts

    @property
    def object_ids(self) -> tuple[str | None, str | None]:
        return self.requested_rewrite.relation_id, self.requested_rewrite.target_new.id


def _given(alt: str) -> str:
    if not alt.strip():
        raise PydanticCustomError("omitted", "empty; such records are left out")
    return alt


class ZsRERecord(Record):
    """A record of zsRE, as MEND published it."""

    keys: ClassVar[frozenset[str]] = frozenset({"src", "alt"})
    new_object: ClassVar[str] = "alt"

    # First, since a record that is to be left out need not be right in other ways.
    alt: Annotated[Whole, AfterValidator(_given)]
    subject: Subject
    src: CompletionQuery
    answers: Many[Text] = []
    rephrase: Texts = []
    loc: Text | None = None
    loc_ans: Text | None = None

    @model_validator(mode="after")
    def _loc_has_answer(self) -> "ZsRERecord":
        if self.loc is not None and self.loc_ans is None:
            raise ValueError("loc_ans: missing, though there is a loc")
        return self

    def request(self) -> EditRequest:
        return EditRequest(self.src, self.subject, self.alt, self.answers[0] if self.answers else None)

    def probes(self, request: EditRequest) -> dict[Task, list[Probe]]:
        new, true = request.target_new, request.target_true
        return {
            "ES": [_probe(request.question, new, true)],
            "PS": _probes(self.rephrase, new, true),
            "NS": [_probe(_asked(self.loc), self.loc_ans, new)] if self.loc and self.loc_ans else [],
        }


def _asked(loc: str) -> str:
    return loc if loc.rstrip().endswith("?") else f"{loc}?"


class _Item(Part):
    prompt: OneText
    ground_truth: Names = []


def _answered(items: Sequence[_Item], wrong: str | None) -> list[Probe]:
    """The texts of the items which have an answer."""
    return [_probe(i.prompt, i.ground_truth[0], wrong, i.ground_truth[1:]) for i in items if i.ground_truth]


class _Portability(Part):
    subject_aliasing: Many[_Item] = Field(default=[], alias="Subject_Aliasing")
    reasoning: Many[_Item] = Field(default=[], alias="Reasoning")
    logical_generalization: Many[_Item] = Field(default=[], alias="Logical_Generalization")


class _Locality(Part):
    relation_specificity: Many[_Item] = Field(default=[], alias="Relation_Specificity")
    forgetfulness: Many[_Item] = Field(default=[], alias="Forgetfulness")


class WikiDataRecord(Record):
    """A record of WikiData counterfact or recent, as KnowEdit published them."""

    keys: ClassVar[frozenset[str]] = frozenset({"subject", "prompt", "target_new"})
    new_object: ClassVar[str] = "target_new"

    subject: Subject
    prompt: Annotated[CompletionQuery, BeforeValidator(_of_one)]
    target_new: Text
    ground_truth: Names = []
    rephrase: Texts = []
    portability: _Portability = _Portability()
    locality: _Locality = _Locality()

    def request(self) -> EditRequest:
        return EditRequest(self.prompt, self.subject, self.target_new, next(iter(self.ground_truth), None))

    def probes(self, request: EditRequest) -> dict[Task, list[Probe]]:
        new, true = request.target_new, request.target_true
        return {
            "ES": [_probe(request.question, new, true)],
            "PS": _probes(self.rephrase, new, true),
            "RS": _answered(self.locality.relation_specificity, new),
            "alias": _answered(self.portability.subject_aliasing, true),
            "reasoning": _answered(self.portability.reasoning, true),
            "logic": _answered(self.portability.logical_generalization, true),
            "forgetting": _answered(self.locality.forgetfulness, new),
        }


# By name; a record is of the first format whose keys it has.
FORMATS: dict[str, type[Record]] = {
    "merged": MergedRecord,
    "counterfact": CounterFactRecord,
    "zsre": ZsRERecord,
    "wikidata": WikiDataRecord,
}


def recognize_format(item: object) -> str:
    """Name of the format of a record, by its keys.

    Raises:
        RecordError: it has the keys of no format, or is no object.
    """
    if not isinstance(item, dict):
        raise RecordError("", f"{kind(item)}; expected an object")
    for name, model in FORMATS.items():
        if model.keys <= item.keys():
            return name
    found = ", ".join(shortened(repr(key), 24) for key in list(item)[:6]) or "none"
    more = f" and {len(item) - 6} more" if len(item) > 6 else ""
    expected = ", or ".join(f"{' and '.join(sorted(model.keys))} ({name})" for name, model in FORMATS.items())
    raise RecordError("", f"its keys are {found}{more}; expected {expected}")


class SnippetsRecord(Part):
    """Texts about what has an object, as ROME published them in ``attribute_snippets.json``."""

    class _Sample(Part):
        text: Text

    relation_id: Text
    target_id: Text
    samples: Many[_Sample]
