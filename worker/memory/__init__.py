"""Weights that do not fit the device: which layers stay, and how the others come when needed."""
