"""Ways to edit side by side: settings, trade-offs, equal efficacy, wordings."""
