"""attn_drift: capture attention before and after a knowledge edit, and restrict the drifting heads (SADR)."""

from attn_drift.attention import AttentionCapture, capture_attention
from attn_drift.cases import Case, Probe
from attn_drift.datasets import CaseFile, Snippets, read_cases, read_snippets
from attn_drift.editors.rome import ROMEConfig, rome
from attn_drift.edits import Edit, applied_to_rows
from attn_drift.history import EditHistory
from attn_drift.models import load_model
from attn_drift.moments import SecondMoment, sampled_moment, second_moment
from attn_drift.requests import EditRequest
from attn_drift.restriction import SADR, AllHeads, FixedHeads, LayerMax, Margin, TopK
from attn_drift.sampling import sample_contexts
from attn_drift.weights import LowRankUpdate

__all__ = [
    "SADR",
    "AllHeads",
    "AttentionCapture",
    "Case",
    "CaseFile",
    "Edit",
    "EditHistory",
    "EditRequest",
    "FixedHeads",
    "LayerMax",
    "LowRankUpdate",
    "Margin",
    "Probe",
    "ROMEConfig",
    "SecondMoment",
    "Snippets",
    "TopK",
    "applied_to_rows",
    "capture_attention",
    "load_model",
    "read_cases",
    "read_snippets",
    "rome",
    "sample_contexts",
    "sampled_moment",
    "second_moment",
]
