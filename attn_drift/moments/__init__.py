"""Second moments of keys: made from texts, streamed, saved, solved with."""
