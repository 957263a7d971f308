"""The model: loading it, its identity, tokens, hooks, temporary changes of it, and texts sampled from it."""
