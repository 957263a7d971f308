"""An edit is a value: low-rank updates of down-projections, applied by hooks or written into weights."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

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

FORMAT = "attn_drift.edit.1"


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """A change of one down-projection: its output gains ``(k @ keys.T) @ values``.

    Attributes:
        keys: directions in key space.
        values: what each adds to the MLP's output.
    """

    keys: Float[Tensor, "rank d_mlp"]
    values: Float[Tensor, "rank d_model"]

    @property
    def rank(self) -> int:
        return len(self.keys)

    def delta(self) -> Float[Tensor, "d_mlp d_model"]:
        """The change of the weight ``W``, where ``v = k @ W``."""
        return self.keys.T @ self.values

    def __add__(self, other: "LowRankUpdate") -> "LowRankUpdate":
        return LowRankUpdate(torch.cat([self.keys, other.keys]), torch.cat([self.values, other.values]))


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of a model that can be applied, written, removed, added to others, saved and loaded.

    Attributes:
        updates: per layer a low-rank update.
        requests: the facts that it changes.
        fingerprint: of the model that it was made for.
        model_name: of that model, for messages.
        method: the editor and its settings, for the record.
        history: of the optimisation; None for sums.
    """

    updates: Mapping[int, LowRankUpdate]
    requests: tuple[EditRequest, ...]
    fingerprint: str
    model_name: str
    method: Mapping[str, object] = field(default_factory=dict)
    history: EditHistory | None = None

    def check_fits(self, model: TransformerBridge) -> None:
        """Raises a ValueError when a layer or a shape is not the model's."""
        for layer, update in self.updates.items():
            check_layer(model, layer)
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
            ValueError: the edit does not fit the model.
        """
        self.check_fits(model)
        hooks = [hook for layer, update in self.updates.items() for hook in updating(layer, update.keys, update.values)]
        with attached(model, hooks):
            yield

    def write_to(self, model: TransformerBridge) -> None:
        """Adds the edit to the model's weights, in place; `remove_from` is the exact inverse.

        Raises:
            ValueError: the edit does not fit the model, or is already written in it.
        """
        self.check_fits(model)
        if any(self in written.edits for written in _written.get(model, {}).values()):
            raise ValueError("this edit is already written in the model; remove_from(model) takes it out")
        for layer in self.updates:
            layers = _written.setdefault(model, {})
            if layer not in layers:
                layers[layer] = _Written(down_projection(model, layer).detach().clone(), [])
            layers[layer].rewrite(model, layer, [*layers[layer].edits, self])

    def remove_from(self, model: TransformerBridge) -> None:
        """Takes a written edit out of the weights; others stay, in whatever order they were written.

        The kept original weight is restored bit for bit, then the edits that remain are added to it.

        Raises:
            ValueError: the edit is not written in this model.
            RuntimeError: something else changed the weight since, so that restoring would lose that change.
        """
        layers = _written.get(model, {})
        if not all(layer in layers and self in layers[layer].edits for layer in self.updates):
            raise ValueError(
                "this edit is not written in this model: write_to was not called with it, it was removed before, or "
                "the model is a copy of the one it was written to"
            )
        for layer in self.updates:
            layers[layer].check_untouched(model, layer)
        for layer in self.updates:
            layers[layer].rewrite(model, layer, [edit for edit in layers[layer].edits if edit is not self])
            if not layers[layer].edits:
                del layers[layer]

    def __add__(self, other: "Edit") -> "Edit":
        """Both edits as one.

        Raises:
            ValueError: they were made for different models.
        """
        if self.fingerprint != other.fingerprint:
            raise ValueError(
                f"edits of different models cannot be added: one was made for {self.model_name} "
                f"({self.fingerprint[:8]}), the other for {other.model_name} ({other.fingerprint[:8]})"
            )
        updates = dict(self.updates)
        for layer, update in other.updates.items():
            updates[layer] = updates[layer] + update if layer in updates else update
        return Edit(
            updates=dict(sorted(updates.items())),
            requests=self.requests + other.requests,
            fingerprint=self.fingerprint,
            model_name=self.model_name,
            method={"editor": "sum", "of": [dict(self.method), dict(other.method)]},
        )

    def save(self, path: str | Path) -> None:
        """Writes the edit as one safetensors file, its record as JSON in the header."""
        tensors = {} if self.history is None else self.history.tensors()
        for layer, update in self.updates.items():
            tensors[f"layers.{layer}.keys"] = update.keys.contiguous()
            tensors[f"layers.{layer}.values"] = update.values.contiguous()
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
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no edit file: {error}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is no edit: its format is {metadata.get('format')!r}, expected {FORMAT!r}")
        edit = cls._from_tensors(path, tensors, metadata.get("record", ""))
        if edit.fingerprint != fingerprint(model):
            raise ValueError(
                f"{path} was made for {edit.model_name} with the weights {edit.fingerprint[:8]}, but the weights of "
                f"{model.cfg.model_name} are {fingerprint(model)[:8]}; load it into the model that it was made for, "
                "without edits written in its weights and in the same dtype"
            )
        edit.check_fits(model)
        return edit

    @classmethod
    def _from_tensors(cls, path: Path, tensors: dict[str, Tensor], record: str) -> "Edit":
        try:
            content = json.loads(record)
            layers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("layers.")})
            updates = {
                layer: LowRankUpdate(tensors[f"layers.{layer}.keys"], tensors[f"layers.{layer}.values"])
                for layer in layers
            }
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
                EditHistory.from_tensors(tensors),
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is a damaged edit: {type(error).__name__}: {error}") from error
        for layer, update in updates.items():
            if update.keys.ndim != 2 or update.values.ndim != 2 or len(update.keys) != len(update.values):
                raise ValueError(f"{path} is a damaged edit: keys and values of layer {layer} do not match")
            if not (torch.isfinite(update.keys).all() and torch.isfinite(update.values).all()):
                raise ValueError(f"{path} is a damaged edit: its update of layer {layer} is not finite")
        return edit


@dataclass
class _Written:
    """The weight of one layer as it was, and the edits written into it since, in order."""

    original: Float[Tensor, "d_mlp d_model"]
    edits: list[Edit]

    def expected(self, layer: int, edits: Sequence[Edit]) -> Float[Tensor, "d_mlp d_model"]:
        weight = self.original
        for edit in edits:
            delta = edit.updates[layer].delta().to(weight.device)
            weight = (weight.to(delta.dtype) + delta).to(weight.dtype)
        return weight

    def rewrite(self, model: TransformerBridge, layer: int, edits: list[Edit]) -> None:
        with torch.no_grad():
            down_projection(model, layer).copy_(self.expected(layer, edits))
        self.edits = edits

    def check_untouched(self, model: TransformerBridge, layer: int) -> None:
        if not torch.equal(down_projection(model, layer), self.expected(layer, self.edits)):
            raise RuntimeError(
                f"the down-projection of layer {layer} was changed by something else since the edit was written; "
                "removing the edit would lose that change, so nothing was done"
            )


_written: WeakKeyDictionary[TransformerBridge, dict[int, _Written]] = WeakKeyDictionary()


@contextmanager
def applied_to_rows(model: TransformerBridge, edits: Sequence[Edit | None]) -> Iterator[None]:
    """Applies to each text of a batch an edit of its own (None: unedited), by hooks.

    Every batch run in the block must have as many texts as there are edits.

    Raises:
        ValueError: an edit does not fit the model.
    """
    for edit in edits:
        if edit is not None:
            edit.check_fits(model)
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
