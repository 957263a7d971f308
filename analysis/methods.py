"""Methods: an editor with its settings and a restriction, by the name that commands use: ``rome+sadr:gamma=0.01``."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal, get_origin, get_type_hints

from pydantic import BeforeValidator, TypeAdapter, ValidationError
from transformer_lens.model_bridge import TransformerBridge

from analysis.edit_inputs import EditInputs
from attn_drift.editors.alphaedit import AlphaEditConfig
from attn_drift.editors.base import check_batches, listed
from attn_drift.editors.memit import MEMITConfig
from attn_drift.editors.multilayer import MultiLayerConfig, edit_batches
from attn_drift.editors.pmet import PMETConfig
from attn_drift.editors.rome import ROMEConfig, rome
from attn_drift.edits.edit import Edit, compose
from attn_drift.model.loading import check_layer
from attn_drift.requests import EditRequest
from attn_drift.restrictions.base import Restriction
from attn_drift.restrictions.presets import preset_gamma
from attn_drift.restrictions.sadr import SADR

NONE = "none"
RESTRICTED = "sadr"

Config = ROMEConfig | MultiLayerConfig


@dataclass(frozen=True)
class Editor:
    """An editor as methods name it.

    Attributes:
        config: its settings; `for_model` gives the preset.
        own: what sets it apart from another editor with the same settings.
    """

    config: type[ROMEConfig] | type[MultiLayerConfig]
    own: Mapping[str, Any] = field(default_factory=dict)


EDITORS: dict[str, Editor] = {
    "rome": Editor(ROMEConfig),
    "r-rome": Editor(ROMEConfig, {"keys": "mean"}),
    "memit": Editor(MEMITConfig),
    "pmet": Editor(PMETConfig),
    "alphaedit": Editor(AlphaEditConfig),
}


def _span(text: str) -> tuple[int, ...]:
    """The layers of a name such as ``4-8``, or of one layer."""
    first, _, last = text.partition("-")
    return tuple(range(int(first), int(last or first) + 1))


def _settable(kind: type) -> dict[str, Any]:
    """The fields of a settings class that a name can set: numbers, words, and edited layers (``layers=4-8``)."""
    hints = get_type_hints(kind)
    plain = {
        f.name: hints[f.name]
        for f in fields(kind)
        if hints[f.name] in (int, float, str) or get_origin(hints[f.name]) is Literal
    }
    spans = {f.name: Annotated[tuple[int, ...], BeforeValidator(_span)] for f in fields(kind) if f.name == "layers"}
    return plain | (spans if issubclass(kind, MultiLayerConfig) else {})


@dataclass(frozen=True)
class Method:
    """What a name such as ``rome+sadr:gamma=0.01:steps=40`` says, before any model is known.

    Attributes:
        name: the name.
        editor: a key of `EDITORS`; None for the unedited model.
        settings: what replaces fields of the editor's preset.
        restriction: what replaces fields of `SADR`; None for no restriction.
    """

    name: str
    editor: str | None
    settings: Mapping[str, Any]
    restriction: Mapping[str, Any] | None

    @classmethod
    def parse(cls, name: str) -> "Method":
        """Reads a name: ``none``, or an editor, ``+sadr`` or not, and ``:setting=value`` any number of times.

        Raises:
            ValueError: an unknown editor, restriction or setting, or a value that is not of its type.
        """
        if name == NONE:
            return cls(NONE, None, {}, None)
        head, *given = name.split(":")
        editor, *restrictions = head.split("+")
        if editor not in EDITORS:
            raise ValueError(f"the editor {editor!r} of {name!r} is not known; expected {NONE!r} or {list(EDITORS)}")
        if restrictions not in ([], [RESTRICTED]):
            raise ValueError(
                f"{name!r} asks for {'+'.join(restrictions)!r}; expected nothing or {RESTRICTED!r} after +"
            )
        known = EDITORS[editor]
        settings = {key: kind for key, kind in _settable(known.config).items() if key not in known.own}
        restriction = _settable(SADR) if restrictions else {}
        values: dict[str, Any] = {}
        for item in given:
            key, equals, text = item.partition("=")
            if not equals or key not in settings | restriction:
                raise ValueError(f"{item!r} of {name!r}: expected setting=value of {sorted(settings | restriction)}")
            if key in values:
                raise ValueError(f"{name!r} sets {key} twice; expected each setting once")
            try:
                values[key] = TypeAdapter((settings | restriction)[key]).validate_python(text)
            except ValidationError as error:
                raise ValueError(f"{item!r} of {name!r}: {error.errors()[0]['msg']}") from error
        return cls(
            name,
            editor,
            {key: value for key, value in values.items() if key in settings},
            {key: value for key, value in values.items() if key in restriction} if restrictions else None,
        )

    def bind(self, model: TransformerBridge) -> "BoundMethod":
        """The method with the model's presets filled in.

        Raises:
            ValueError: a setting out of its range, or a layer that the model does not have.
        """
        if self.editor is None:
            return BoundMethod(self, None, None)
        editor = EDITORS[self.editor]
        config: Config = editor.config.for_model(model, **{**editor.own, **self.settings})
        for layer in config.layers:
            check_layer(model, layer)
        if self.restriction is None:
            return BoundMethod(self, config, None)
        given = dict(self.restriction)
        if "gamma" not in given:
            given["gamma"] = preset_gamma(config.editor, model, config.restricted_above)
        restrict = SADR(**given)
        restrict.restricted_layers(model, config.restricted_above)
        return BoundMethod(self, config, restrict)


def parse_methods(names: Sequence[str]) -> list[Method]:
    """The methods of a list of names, the unedited model first whether or not it is named.

    Raises:
        ValueError: a bad name, one given twice, or a text instead of a list.
    """
    if isinstance(names, str):
        raise ValueError(f"the methods are the text {names!r}; expected a list of names")
    names = [name.strip() for name in names if name.strip() and name.strip() != NONE]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{twice} are given twice; expected each method once")
    return [Method.parse(name) for name in (NONE, *names)]


@dataclass(frozen=True)
class BoundMethod:
    """A method for one model.

    Attributes:
        method: what was asked for.
        config: the editor's settings; None for the unedited model.
        restrict: the restriction, if any.
    """

    method: Method
    config: Config | None
    restrict: SADR | None

    @property
    def gamma(self) -> float:
        """Weight of the restriction; 0 without one."""
        return 0.0 if self.restrict is None else self.restrict.gamma

    @property
    def steps(self) -> int:
        """Steps of the optimizer; 0 for the unedited model."""
        return 0 if self.config is None else self.config.steps

    def edits(self, requests: EditRequest | Sequence[EditRequest], inputs: EditInputs) -> list[Edit] | None:
        """An edit for each request; None for the unedited model."""
        return None if self.config is None else single_edits(inputs, requests, self.config, self.restrict)

    def edit(
        self, requests: EditRequest | Sequence[EditRequest], inputs: EditInputs, after: Edit | None = None
    ) -> Edit | None:
        """One edit of all requests, made while an earlier one is in effect; None for the unedited model."""
        return None if self.config is None else one_edit(inputs, requests, self.config, self.restrict, after)

    def record(self, inputs: EditInputs | None = None) -> dict[str, Any]:
        """All settings, as JSON takes them, and which files of second moments it reads, if any."""
        digests = {} if self.config is None or inputs is None else inputs.digests(self.config.layers)
        return {
            **({"moments": digests} if digests else {}),
            "editor": self.method.editor,
            "config": None if self.config is None else asdict(self.config),
            "restrict": None if self.restrict is None else repr(self.restrict),
            "gamma": self.gamma,
            "steps": self.steps,
        }


def single_edits(
    inputs: EditInputs, requests: EditRequest | Sequence[EditRequest], config: Config, restrict: Restriction | None
) -> list[Edit]:
    """An edit for each request, optimized together, by the editor whose settings are given.

    Raises:
        ValueError: there are none, or something else is among them.
    """
    several = listed(requests)
    contexts = inputs.contexts(config.context_lengths)
    if isinstance(config, ROMEConfig):
        moment = inputs.moment(config.layer)
        return rome(inputs.model, several, config=config, contexts=contexts, moment=moment, restrict=restrict)
    moments = inputs.moments(config.layers)
    return edit_batches(inputs.model, several, config, contexts=contexts, moments=moments, restrict=restrict)


def one_edit(
    inputs: EditInputs,
    requests: EditRequest | Sequence[EditRequest],
    config: Config,
    restrict: Restriction | None,
    after: Edit | None = None,
) -> Edit:
    """One edit of all requests, made while an earlier one is in effect; by ROME the sum of single edits.

    Raises:
        ValueError: there are no requests, something else is among them, or one fact is asked for twice.
    """
    check_batches([requests])
    # Before an edit is in effect: contexts and moments are those of the unedited model.
    contexts, moments = inputs.contexts(config.context_lengths), inputs.moments(config.layers)
    if isinstance(config, ROMEConfig):
        with nullcontext() if after is None else after.applied(inputs.model):
            return compose(single_edits(inputs, requests, config, restrict))
    (edit,) = edit_batches(
        inputs.model,
        [requests],
        config,
        contexts=contexts,
        moments=moments,
        restrict=restrict,
        after=after,
    )
    return edit
