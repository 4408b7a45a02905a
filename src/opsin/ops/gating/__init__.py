"""Multiplicative mixers."""
