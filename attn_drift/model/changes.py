"""Temporary changes of a model, by one thread at a time: recorded before they are made, undone however a block ends.

What an interrupt leaves behind all the same is undone, and named in the log, by whatever uses the model next.
"""

import logging
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from inspect import GEN_CLOSED, getgeneratorstate
from typing import ParamSpec, TypeVar
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from transformer_lens.model_bridge import TransformerBridge

from attn_drift.model.bridge import check_bridge

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

# Held for the bookkeeping of claims, never while a model runs.
_lock = threading.RLock()
_acting = threading.local()


class Claim:
    """The use of a model by one thread for the length of a block; other threads are refused meanwhile.

    Args:
        model: the model.
        purpose: what it is used for, for messages.

    Raises:
        ValueError: no model that `load_model` returns.
    """

    thread: threading.Thread
    generator: ReferenceType[Generator[None, None, None]]

    def __init__(self, model: TransformerBridge, purpose: str) -> None:
        check_bridge(model)
        self.model, self.purpose = model, purpose

    def __str__(self) -> str:
        return self.purpose

    def make(self) -> None:
        """Makes the change that goes with the claim, if any."""

    def undo(self) -> None:
        """Undoes the change, also one that was made in part; called again where it was interrupted."""

    def check(self) -> None:
        """Raises an error if something else undid the change; called after a block that raised none."""

    @property
    def is_over(self) -> bool:
        """Whether the block has ended, or nobody is left to end it."""
        generator = self.generator()
        return generator is None or getgeneratorstate(generator) == GEN_CLOSED or not self.thread.is_alive()


class Change(Claim):
    """A claim to change a model; what is left of one is worth a warning."""


class _Call(Claim):
    """The claim of a function that runs the model: whatever was begun inside ends with it, torch's modes too."""

    def make(self) -> None:
        self.gradients = torch.is_grad_enabled()

    def undo(self) -> None:
        # An interrupt while torch.no_grad() ends leaves it on.
        torch.set_grad_enabled(self.gradients)
        claims = _claims[self.model]
        for inner in reversed(claims[claims.index(self) + 1 :]):
            _end(inner)


# In the order of their beginning, all of one thread.
_claims: WeakKeyDictionary[TransformerBridge, list[Claim]] = WeakKeyDictionary()


def block(claim: Claim) -> AbstractContextManager[None]:
    """A block for the length of a claim.

    Raises:
        RuntimeError: another thread is using the model.
    """
    manager = _block(claim)
    # Weak, so that one that is dropped half-way is closed.
    claim.generator = ref(manager.gen)
    return manager


def claimed(model: TransformerBridge, purpose: str) -> AbstractContextManager[None]:
    """A block in which no other thread may use a model through this package.

    A model's own methods, such as its forward pass, are not guarded.

    Args:
        model: the model.
        purpose: what it is used for, for the error of another thread.

    Raises:
        RuntimeError: another thread is using the model.
    """
    return block(Claim(model, purpose))


def exclusive(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function whose first argument is a model refuse to run while another thread is using that model."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs.get("model")
        if not isinstance(model, TransformerBridge):
            # The function itself says what is wrong.
            return function(*args, **kwargs)
        with block(_Call(model, function.__name__)):
            return function(*args, **kwargs)

    return call


def on_behalf(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which counts as called by this thread wherever it runs.

    Autograd has threads of its own on a GPU, in which it computes checkpoints anew.
    """
    thread = _thread()

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        before, _acting.thread = _thread(), thread
        try:
            return function(*args, **kwargs)
        finally:
            _acting.thread = before

    return call


def open_claims(model: TransformerBridge) -> list[Claim]:
    """The claims to a model whose blocks have not ended, in the order of their beginning."""
    undo_leftovers(model)
    return list(_claims.get(model, ()))


def undo_leftovers(model: TransformerBridge) -> None:
    """Undoes what interrupted blocks left on a model, the last first, and names it in the log."""
    with _lock:
        leftovers = [claim for claim in reversed(_claims.get(model, ())) if claim.is_over]
        for claim in leftovers:
            _end(claim)
    for claim in leftovers:
        if isinstance(claim, Change):
            log.warning("an interrupted block left this on %s, and it is undone now: %s", model.cfg.model_name, claim)


@contextmanager
def _block(claim: Claim) -> Iterator[None]:
    try:
        try:
            _begin(claim)
            claim.make()
            yield
        finally:
            _end(claim)
    finally:
        # Again, since an interrupt may have fallen into the first.
        _end(claim)
    claim.check()


def _begin(claim: Claim) -> None:
    undo_leftovers(claim.model)
    with _lock:
        claims = _claims.setdefault(claim.model, [])
        claim.thread = _thread()
        if claims and claims[0].thread is not claim.thread:
            raise RuntimeError(
                f"{claim.model.cfg.model_name} is in use by the thread {claims[0].thread.name!r} ({claims[0]}), but "
                f"{claim.thread.name!r} asked for it ({claim}); a model serves one thread at a time: wait until the "
                "other is done, or load a model for each thread"
            )
        claims.append(claim)


def _end(claim: Claim) -> None:
    with _lock:
        claims = _claims.get(claim.model, [])
        if claim in claims:
            claim.undo()
            claims.remove(claim)


def _thread() -> threading.Thread:
    """The thread that is running, or that it is acting for."""
    return getattr(_acting, "thread", None) or threading.current_thread()
