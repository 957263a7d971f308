"""Restrictions: loss terms that limit what an edit may change. One file each."""
