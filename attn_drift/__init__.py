"""attn_drift: capture attention before and after a knowledge edit, and restrict the drifting heads (SADR)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_drift.attention import AttentionCapture, capture_attention
    from attn_drift.cases import Case, Probe
    from attn_drift.corpora import read_corpus
    from attn_drift.datasets import CaseFile, Snippets, read_cases, read_snippets
    from attn_drift.editors.alphaedit import AlphaEditConfig, alphaedit
    from attn_drift.editors.memit import MEMITConfig, memit
    from attn_drift.editors.pmet import PMETConfig, pmet
    from attn_drift.editors.rome import ROMEConfig, rome
    from attn_drift.edits import Edit, applied_to_rows, compose
    from attn_drift.exports import export
    from attn_drift.hidden_state import HiddenState
    from attn_drift.history import EditHistory
    from attn_drift.models import load_model
    from attn_drift.moments import SecondMoment, sampled_moment, sampled_moments, second_moment, second_moments
    from attn_drift.requests import EditRequest
    from attn_drift.restriction import SADR, AllHeads, FixedHeads, LayerMax, Margin, TopK
    from attn_drift.sampling import sample_contexts
    from attn_drift.streaming import StreamedMoments, stream_moments
    from attn_drift.weights import LowRankUpdate

__all__ = [
    "SADR",
    "AllHeads",
    "AlphaEditConfig",
    "AttentionCapture",
    "Case",
    "CaseFile",
    "Edit",
    "EditHistory",
    "EditRequest",
    "FixedHeads",
    "HiddenState",
    "LayerMax",
    "LowRankUpdate",
    "MEMITConfig",
    "Margin",
    "PMETConfig",
    "Probe",
    "ROMEConfig",
    "SecondMoment",
    "Snippets",
    "StreamedMoments",
    "TopK",
    "alphaedit",
    "applied_to_rows",
    "capture_attention",
    "compose",
    "export",
    "load_model",
    "memit",
    "pmet",
    "read_cases",
    "read_corpus",
    "read_snippets",
    "rome",
    "sample_contexts",
    "sampled_moment",
    "sampled_moments",
    "second_moment",
    "second_moments",
    "stream_moments",
]

# Where each name lives. It is imported when first used: TransformerLens takes seconds, and reading a file of cases
# does not need it.
_HOMES = {
    "SADR": "restriction",
    "AllHeads": "restriction",
    "AlphaEditConfig": "editors.alphaedit",
    "AttentionCapture": "attention",
    "Case": "cases",
    "CaseFile": "datasets",
    "Edit": "edits",
    "EditHistory": "history",
    "EditRequest": "requests",
    "FixedHeads": "restriction",
    "HiddenState": "hidden_state",
    "LayerMax": "restriction",
    "LowRankUpdate": "weights",
    "MEMITConfig": "editors.memit",
    "Margin": "restriction",
    "PMETConfig": "editors.pmet",
    "Probe": "cases",
    "ROMEConfig": "editors.rome",
    "SecondMoment": "moments",
    "Snippets": "datasets",
    "StreamedMoments": "streaming",
    "TopK": "restriction",
    "alphaedit": "editors.alphaedit",
    "applied_to_rows": "edits",
    "capture_attention": "attention",
    "compose": "edits",
    "export": "exports",
    "load_model": "models",
    "memit": "editors.memit",
    "pmet": "editors.pmet",
    "read_cases": "datasets",
    "read_corpus": "corpora",
    "read_snippets": "datasets",
    "rome": "editors.rome",
    "sample_contexts": "sampling",
    "sampled_moment": "moments",
    "sampled_moments": "moments",
    "second_moment": "moments",
    "second_moments": "moments",
    "stream_moments": "streaming",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
