"""Scores of an edit: what the model answers, how likely, and how fluently."""
