"""The lines from the gateway to the workers: gRPC, one channel a process."""
