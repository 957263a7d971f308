"""Quantify attention drift, explain what it breaks, show it."""
