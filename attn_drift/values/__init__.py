"""Value optimization: the vector that an editor writes."""
