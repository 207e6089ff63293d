"""One step of the model: from chunks of sequences to tensors, through the decoder, to tokens."""
