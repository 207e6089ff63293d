"""What a compression may start from besides a checkpoint: an adapter, another compressed one."""
