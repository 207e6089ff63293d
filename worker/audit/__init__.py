"""Audit: whether keys and values in narrow numbers are as near as promised, recomputed."""
