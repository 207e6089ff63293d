"""Conversations that outnumber the cache go on with the same tokens."""

from benchmarks.spill import Size, measure


def test_a_small_run_restores_and_changes_no_token() -> None:
    figures = measure(Size(5, 150, 2), dry=True)
    assert figures["same_tokens"] and figures["restored_blocks"] > 0
    assert figures["next_token_ms"]["host"] > 0 and figures["restore_gb_per_s"] > 0
