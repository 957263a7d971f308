"""Edits: low-rank updates that are applied, written, saved and exported."""
