"""Interventions: what the model answers when activations of another run are written into it."""
