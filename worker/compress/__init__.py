"""Compression: from a full checkpoint to a sparse, quantized one."""
