"""Layers that do not stay on the device, and how they run from slots all the same."""
