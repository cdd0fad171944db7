"""Inference-time steering and search: one file a method, found by name."""
