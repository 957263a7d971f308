"""Why an edit breaks other knowledge: all studies on one model and its cases, in one folder."""

from attn_drift.cases import Task

# The texts that every case must have.
NEEDED: tuple[Task, ...] = ("ES", "PS", "DNS")
