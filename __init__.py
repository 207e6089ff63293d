"""Conclave: an ensemble of single-GPU Gemma 4 workers, orchestrated over gRPC."""
