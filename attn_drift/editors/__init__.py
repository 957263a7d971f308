"""Editors: what becomes of an optimized value. One file each."""
