"""The fleet in its Ray cluster: which workers there shall be, and bringing that about."""
