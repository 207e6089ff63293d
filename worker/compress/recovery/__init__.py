"""Recovery: the survivors of a compressed checkpoint learn to make up for what is gone."""
