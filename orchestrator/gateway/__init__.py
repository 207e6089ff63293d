"""The door of the fleet: one gRPC server in front of all workers."""
