"""Pooling, norms and activations that act on a map."""
