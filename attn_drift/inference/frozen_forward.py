"""Ways to run a frozen model over and over that give the same in fewer operations: fused kernels, and what is constant.

Both put other forward methods in place of modules' own for as long as a block lasts.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.nn.functional import gelu
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import NormalizationBridge
from transformers.activations import NewGELUActivation

from attn_drift.model.changes import Change, block
from attn_drift.model.hooks import components, has_hooks, outputs_observed

Forward = Callable[..., Any]


def fused(model: TransformerBridge) -> dict[Module, Forward]:
    """Forward methods of one kernel for modules that spell the same out in many operations, to be `replaced`.

    These are norms that no hook looks into, which TransformerLens writes out to show their parts, and the GELU of GPT-2
    and GPT-J. Results differ by rounding; what is kept for the backward pass is a fraction.
    """
    forwards: dict[Module, Forward] = {}
    for module in components(model):
        if isinstance(module, NormalizationBridge) and not has_hooks(module) and _same_epsilon(module):
            forwards[module] = module.original_component
        elif isinstance(module, NewGELUActivation):
            forwards[module] = partial(gelu, approximate="tanh")
    return forwards


def _same_epsilon(norm: NormalizationBridge) -> bool:
    """Whether a norm adds to the variance what the bridge, which takes it from the model's settings, adds."""
    wrapped = norm.original_component
    own = getattr(wrapped, "eps", getattr(wrapped, "variance_epsilon", None))
    return bool(own == getattr(norm.config, "eps", None))


class Constants:
    """What modules put out that does not depend on what is optimized: recorded in one run, put in place in later ones.

    A module is constant if it takes no gradient in a run in which all that is optimized does. Those inside a constant
    one are not run either, and their hooks do not fire.
    """

    def __init__(self, model: TransformerBridge) -> None:
        self.model = model
        self.forwards: dict[Module, Forward] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A block with one run of the model, the first."""
        outputs: dict[Module, Any] = {}
        calls: Counter[Module] = Counter()

        def keep(module: Module, _inputs: Any, output: Any) -> None:
            calls[module] += 1
            if _is_constant(output):
                outputs[module] = (output, [part._version for part in _tensors(output)])

        # Before other hooks, which act again on what is put in place.
        with outputs_observed(self.model, keep):
            yield
        constant = {
            module: output
            for module, (output, versions) in outputs.items()
            # What was changed in place is no longer what the module put out.
            if calls[module] == 1 and versions == [part._version for part in _tensors(output)]
        }
        for module in components(self.model):
            inside = _wrapped(module)
            # A bridge that runs fires points of what it wraps where that does not: hooks there would act again.
            if module not in constant and inside in constant and _hooked(inside):
                del constant[inside]
        inner = {child for module in constant for child in module.modules() if child is not module}
        self.forwards = {}
        for module in constant.keys() - inner:
            # What a bridge wraps is put in its place, where it can be: the bridge's own hooks act on it as ever.
            inside = _wrapped(module)
            place = inside if inside in constant and not _hooked(inside) else module
            self.forwards[place] = _always(constant[place])

    def put(self) -> AbstractContextManager[None]:
        """A block in which constant modules put out what they did."""
        return replaced(self.model, self.forwards)


def _wrapped(module: Module) -> Any:
    """What a bridge wraps; None for other modules."""
    return getattr(module, "original_component", None)


def _hooked(module: Module) -> bool:
    """Whether a hook is attached inside a module."""
    return any(has_hooks(part) for part in module.modules())


def _always(output: Any) -> Forward:
    return lambda *_inputs, **_options: output


def _tensors(output: Any) -> list[Tensor]:
    parts = output if isinstance(output, tuple | list) else (output,)
    return [part for part in parts if isinstance(part, Tensor)]


def _is_constant(output: Any) -> bool:
    """Whether it is tensors without gradient (and None beside them), nothing else."""
    parts = output if isinstance(output, tuple | list) else (output,)
    tensors = _tensors(output)
    known = len(tensors) + sum(part is None for part in parts) == len(parts)
    return bool(tensors) and known and not any(part.requires_grad for part in tensors)


def replaced(model: TransformerBridge, forwards: Mapping[Module, Forward]) -> AbstractContextManager[None]:
    """A block in which modules of a model have other forward methods.

    Raises:
        RuntimeError: another thread is using the model.
    """
    return block(_Replacement(model, forwards))


class _Replacement(Change):
    """Other forward methods in place of modules' own."""

    def __init__(self, model: TransformerBridge, forwards: Mapping[Module, Forward]) -> None:
        super().__init__(model, f"other forward methods of {len(forwards)} modules")
        self.forwards = forwards
        self.before: dict[Module, Forward | None] = {}

    def make(self) -> None:
        # Set past __setattr__: a bridge hands plain assignments on to what it wraps.
        self.before = {module: vars(module).get("forward") for module in self.forwards}
        for module, forward in self.forwards.items():
            vars(module)["forward"] = forward

    def undo(self) -> None:
        for module, own in self.before.items():
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own
