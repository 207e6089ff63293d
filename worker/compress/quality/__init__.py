"""Quality: what compression did to a model, told to people and scripts."""
