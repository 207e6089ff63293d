"""One script a question; results are JSON in `results/`, RESULTS.md is made from them."""
