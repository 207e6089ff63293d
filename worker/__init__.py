"""One GPU, one model, one gRPC server."""
