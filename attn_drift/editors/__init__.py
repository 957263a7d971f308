"""Editors: what becomes of an optimised value. One file each."""
