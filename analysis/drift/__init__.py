"""Attention drift: its measures, the heads that drift, and how it goes with what an edit breaks."""

from analysis.drift.measures import AttentionDrift, SubjectAttention, attention_drift, subject_attention

__all__ = ["AttentionDrift", "SubjectAttention", "attention_drift", "subject_attention"]
