"""The shipped model's route: index files, corpus, tokenizer, encoding, training, evaluation, card.

`examples/train_model.py` is its command line.
"""
