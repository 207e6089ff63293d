"""Pure bookkeeping: who runs next, which block holds what. No tensors, no threads."""
