"""The door of a worker: gRPC."""
