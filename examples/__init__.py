"""The shipped model, and how it was made."""
