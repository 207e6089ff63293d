"""Gemma 4's text decoder: its shape (config), its parts (layers), the whole (decoder)."""
