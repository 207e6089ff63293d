"""To and from the checkpoints that others read: Hugging Face folders, plain or pack-quantized."""
