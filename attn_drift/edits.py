"""An edit is a value: low-rank updates of down-projections, applied by hooks or written into weights."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.files import replacing
from attn_drift.history import EditHistory
from attn_drift.hooks import attached, updating
from attn_drift.models import check_layer, down_projection, fingerprint
from attn_drift.requests import EditRequest
from attn_drift.weights import LowRankUpdate, WrittenLayer, WrittenModel, identities, written

log = logging.getLogger(__name__)

FORMAT = "attn_drift.edit.1"


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """A change of a model that can be applied, written, removed, added to others, saved and loaded.

    Attributes:
        updates: per layer a low-rank update.
        requests: the facts that it changes.
        fingerprint: of the model that it was made for.
        model_name: of that model, for messages.
        method: the editor and its settings, for the record.
        histories: of the optimisation, one for each request; empty where one is not known.
        parts: the edits that a sum was made of, none of them a sum; so that none counts twice.
    """

    updates: Mapping[int, LowRankUpdate]
    requests: tuple[EditRequest, ...]
    fingerprint: str
    model_name: str
    method: Mapping[str, object] = field(default_factory=dict)
    histories: tuple[EditHistory, ...] = ()
    parts: tuple["Edit", ...] = ()

    def __repr__(self) -> str:
        facts = ", ".join(f"{request.question!r} -> {request.target_new!r}" for request in self.requests[:3])
        more = f" and {len(self.requests) - 3} more" if len(self.requests) > 3 else ""
        where = ", ".join(f"L{layer} rank {update.rank}" for layer, update in self.updates.items())
        return f"Edit({self.method.get('editor', 'edit')} of {self.model_name}, {where}: {facts}{more})"

    @property
    def history(self) -> EditHistory | None:
        """Of the edit of one request; None for several."""
        return self.histories[0] if len(self.histories) == 1 else None

    def check_fits(self, model: TransformerBridge) -> None:
        """Raises a ValueError when a layer or a shape is not the model's, or the update is not finite."""
        for layer, update in self.updates.items():
            check_layer(model, layer)
            if not (torch.isfinite(update.keys).all() and torch.isfinite(update.values).all()):
                raise ValueError(f"the edit's update of layer {layer} is not finite")
            expected = tuple(down_projection(model, layer).shape)
            given = (update.keys.shape[1], update.values.shape[1])
            if given != expected:
                raise ValueError(
                    f"the edit was made for {self.model_name}: its update of layer {layer} has [d_mlp d_model] = "
                    f"{list(given)}, but {model.cfg.model_name} has {list(expected)}"
                )

    @contextmanager
    def applied(self, model: TransformerBridge) -> Iterator[None]:
        """Applies the edit to everything that the model runs in the block, by hooks: no weight is touched.

        Raises:
            ValueError: the edit does not fit the model, or is written in its weights, so that it would count twice.
        """
        self.check_fits(model)
        self.check_not_written(model)
        self._warn_of_another_model(model)
        hooks = [hook for layer, update in self.updates.items() for hook in updating(layer, update.keys, update.values)]
        with attached(model, hooks):
            yield

    def write_to(self, model: TransformerBridge) -> None:
        """Adds the edit to the model's weights, in place; `remove_from` is the exact inverse.

        Raises:
            ValueError: the edit does not fit the model, or is already written in it.
            RuntimeError: something else changed a weight since another edit was written into it.
        """
        self.check_fits(model)
        self.check_not_written(model)
        self._warn_of_another_model(model)
        record = written.setdefault(model, WrittenModel())
        record.fingerprints.add(fingerprint(model))
        for layer in self.updates.keys() & record.layers.keys():
            record.layers[layer].check_untouched(model, layer)
        for layer in self.updates:
            if layer not in record.layers:
                record.layers[layer] = WrittenLayer(down_projection(model, layer).detach().clone())
            record.layers[layer].add(model, layer, self, self.updates[layer])

    def remove_from(self, model: TransformerBridge) -> None:
        """Takes a written edit out of the weights; others stay, in whatever order they were written.

        The kept original weight is restored bit for bit, then the edits that remain are added to it.

        Raises:
            ValueError: the edit is not written in this model.
            RuntimeError: something else changed the weight since, so that restoring would lose that change.
        """
        layers = written[model].layers if model in written else {}
        if not all(layer in layers and self in layers[layer].updates for layer in self.updates):
            raise ValueError(
                "this edit is not written in this model: write_to was not called with it, it was removed before, or "
                "the model is a copy of the one it was written to"
            )
        for layer in self.updates:
            layers[layer].check_untouched(model, layer)
        for layer in self.updates:
            layers[layer].remove(model, layer, self)
            if not layers[layer].updates:
                del layers[layer]
        if not layers:
            del written[model]

    def leaves(self) -> set["Edit"]:
        """The edits that this one is made of: its parts, or itself."""
        return set(self.parts) or {self}

    def check_not_written(self, model: TransformerBridge) -> None:
        """Raises a ValueError when the edit, or one that it shares a part with, is written in the model's weights."""
        layers = written[model].layers.values() if model in written else ()
        mine = self.leaves()
        if any(mine & edit.leaves() for layer in layers for edit in layer.updates):
            raise ValueError("this edit is already written in the model; remove_from(model) takes it out")

    def _warn_of_another_model(self, model: TransformerBridge) -> None:
        if self.fingerprint not in identities(model):
            log.warning(
                "%r was made for other weights (%s) than those of %s (%s)",
                self,
                self.fingerprint[:8],
                model.cfg.model_name,
                fingerprint(model)[:8],
            )

    def __add__(self, other: "Edit") -> "Edit":
        """Both edits as one.

        Raises:
            ValueError: they were made for different models.
        """
        if self.fingerprint != other.fingerprint:
            raise ValueError(
                f"edits of different weights cannot be added: one was made for {self.model_name} "
                f"({self.fingerprint[:8]}), the other for {other.model_name} ({other.fingerprint[:8]}): another model, "
                "another dtype, or one was made while an edit was written in the weights"
            )
        updates = dict(self.updates)
        for layer, update in other.updates.items():
            updates[layer] = updates[layer] + update if layer in updates else update
        parts = (*(self.parts or (self,)), *(other.parts or (other,)))
        return Edit(
            updates=dict(sorted(updates.items())),
            requests=self.requests + other.requests,
            fingerprint=self.fingerprint,
            model_name=self.model_name,
            method={"editor": "sum", "of": [dict(part.method) for part in parts]},
            parts=parts,
        )

    def save(self, path: str | Path) -> None:
        """Writes the edit as one safetensors file, its record as JSON in the header."""
        tensors = {
            f"history.{i}.{name}": t for i, own in enumerate(self.histories) for name, t in own.tensors().items()
        }
        for layer, update in self.updates.items():
            tensors[f"layers.{layer}.keys"] = update.keys.contiguous()
            tensors[f"layers.{layer}.values"] = update.values.contiguous()
            if update.served is not None:
                tensors[f"layers.{layer}.served"] = update.served.contiguous()
        record = {
            "requests": [asdict(request) for request in self.requests],
            "fingerprint": self.fingerprint,
            "model_name": self.model_name,
            "method": dict(self.method),
        }
        with replacing(Path(path)) as temporary:
            save_file(tensors, temporary, metadata={"format": FORMAT, "record": json.dumps(record)})

    @classmethod
    def load(cls, path: str | Path, model: TransformerBridge) -> "Edit":
        """Reads an edit for the model that it was made for.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, is no edit, or belongs to another model.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no edit file {path.absolute()}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no edit file: {error}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is no edit: its format is {metadata.get('format')!r}, expected {FORMAT!r}")
        edit = cls._from_tensors(path, tensors, metadata.get("record", ""))
        if edit.fingerprint not in identities(model):
            raise ValueError(
                f"{path} was made for {edit.model_name} with the weights {edit.fingerprint[:8]}, but the weights of "
                f"{model.cfg.model_name} are {fingerprint(model)[:8]}; load it into the model that it was made for, "
                "in the same dtype and without changed weights"
            )
        edit.check_fits(model)
        return edit

    @classmethod
    def _from_tensors(cls, path: Path, tensors: dict[str, Tensor], record: str) -> "Edit":
        try:
            content = json.loads(record)
            layers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("layers.")})
            updates = {layer: _read_update(layer, tensors) for layer in layers}
            requests = tuple(
                EditRequest(**{**request, "rephrasings": tuple(request["rephrasings"])})
                for request in content["requests"]
            )
            edit = cls(
                updates,
                requests,
                str(content["fingerprint"]),
                str(content["model_name"]),
                dict(content["method"]),
                _read_histories(tensors),
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{path} is a damaged edit: {type(error).__name__}: {error}") from error
        if not updates:
            raise ValueError(f"{path} is a damaged edit: it has no layers")
        return edit


def _read_histories(tensors: Mapping[str, Tensor]) -> tuple[EditHistory, ...]:
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("history."):
            _, index, column = name.split(".")
            found.setdefault(int(index), {})[column] = tensor
    return tuple(EditHistory.from_tensors(found[index]) for index in sorted(found))


def _read_update(layer: int, tensors: Mapping[str, Tensor]) -> LowRankUpdate:
    keys, values = tensors[f"layers.{layer}.keys"], tensors[f"layers.{layer}.values"]
    if keys.ndim != 2 or values.ndim != 2 or len(keys) != len(values):
        raise ValueError(f"keys and values of layer {layer} do not match")
    served = tensors.get(f"layers.{layer}.served")
    if served is not None and (served.ndim != 2 or served.shape[1] != keys.shape[1]):
        raise ValueError(f"the keys that the update of layer {layer} serves are not as wide as its own")
    for tensor in (keys, values, *(() if served is None else (served,))):
        if not tensor.is_floating_point():
            raise ValueError(f"the update of layer {layer} is not of floats")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the update of layer {layer} is not finite")
    return LowRankUpdate(keys, values, served)


@contextmanager
def applied_to_rows(model: TransformerBridge, edits: Sequence[Edit | None]) -> Iterator[None]:
    """Applies to each text of a batch an edit of its own (None: unedited), by hooks.

    Every batch run in the block must have as many texts as there are edits.

    Raises:
        ValueError: an edit does not fit the model, or is written in its weights, so that it would count twice.
    """
    for edit in {edit for edit in edits if edit is not None}:
        edit.check_fits(model)
        edit.check_not_written(model)
    layers = sorted({layer for edit in edits if edit is not None for layer in edit.updates})
    with ExitStack() as stack:
        for layer in layers:
            keys, values = _stacked(layer, edits)
            stack.enter_context(attached(model, updating(layer, keys, values)))
        yield


def _stacked(
    layer: int, edits: Sequence[Edit | None]
) -> tuple[Float[Tensor, "text rank d_mlp"], Float[Tensor, "text rank d_model"]]:
    """The updates of one layer, a row each, missing ranks filled with zeros."""
    updates = [edit.updates.get(layer) if edit is not None else None for edit in edits]
    present = [update for update in updates if update is not None]
    rank = max(update.rank for update in present)
    keys = present[0].keys.new_zeros(len(edits), rank, present[0].keys.shape[1])
    values = present[0].values.new_zeros(len(edits), rank, present[0].values.shape[1])
    for row, update in enumerate(updates):
        if update is not None:
            keys[row, : update.rank] = update.keys
            values[row, : update.rank] = update.values
    return keys, values
