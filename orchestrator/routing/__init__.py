"""What the gateway knows of the workers, and which of them answers. Pure."""
