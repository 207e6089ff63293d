"""Text comes out whole: no split code point, no stop text, nothing lost."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conclave.worker.text.detokenizer import Detokenizer, StopText
from conclave.worker.text.tokenizer import Tokenizer

TEXTS = [
    "plain words",
    "naïve café",
    "日本語のテキスト",
    "emoji 👩‍👩‍👧 family",
    "a\ufffdb",
    "mixed 漢字 and ж",
]


def pieces(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special=True)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(byte_tokenizer: Tokenizer, text: str) -> None:
    ids = byte_tokenizer.encode(text, special=False)
    assert len(ids) == len(text.encode())
    out = pieces(byte_tokenizer, ids, byte_tokenizer.encode("prompt "))
    assert "".join(out) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in out)


def test_code_points_are_never_split(byte_tokenizer: Tokenizer) -> None:
    out = pieces(byte_tokenizer, byte_tokenizer.encode("日a", special=False), [])
    assert out == ["", "", "日", "a", ""]


def test_broken_end_is_flushed(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("é", special=False)[:1]
    assert "".join(pieces(byte_tokenizer, ids, [])) == "\ufffd"


def test_prompt_that_ends_inside_a_code_point(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("x日", special=False)
    assert "".join(pieces(byte_tokenizer, ids[2:], ids[:2])) == "日"


def test_special_tokens_are_left_out_or_kept(byte_tokenizer: Tokenizer) -> None:
    ids = [
        *byte_tokenizer.encode("a", special=False),
        1,
        *byte_tokenizer.encode("b", special=False),
    ]
    assert "".join(pieces(byte_tokenizer, ids, [])) == "ab"
    kept = Detokenizer(byte_tokenizer, [], skip_special=False)
    assert "".join(kept.push(token) for token in ids) == "a<eos>b"


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=40))
def test_any_bytes_join_to_what_whole_decoding_gives(
    byte_tokenizer: Tokenizer, data: bytes
) -> None:
    alphabet = byte_tokenizer.encode("a", special=False)[0] - ord("a")
    ids = [alphabet + byte for byte in data]
    assert "".join(pieces(byte_tokenizer, ids, [])) == byte_tokenizer.decode(ids)


def run_stops(parts: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None]:
    stop, shown = StopText(stops, include), ""
    for part in parts:
        shown += stop.push(part)
        if stop.matched:
            return shown, stop.matched
    return shown + stop.flush(), None


@pytest.mark.parametrize(
    ("parts", "stops", "shown", "matched"),
    [
        (["ab", "cd"], ["bc"], "a", "bc"),
        (["a", "b", "c", "d"], ["abd"], "abcd", None),
        (["aab"], ["ab"], "a", "ab"),
        (["a", "a", "a", "b"], ["aab"], "a", "aab"),
        (["x", "END", "y"], ["END", "EN"], "x", "END"),
        (["one\n", "\ntwo"], ["\n\n"], "one", "\n\n"),
        (["bcd"], ["cd", "bc"], "", "bc"),
        (["end is open"], ["open!"], "end is open", None),
    ],
)
def test_stop_texts_across_pieces(
    parts: list[str], stops: list[str], shown: str, matched: str | None
) -> None:
    assert run_stops(parts, stops) == (shown, matched)


def test_included_stop_text_is_shown() -> None:
    assert run_stops(["ab", "cd"], ["bc"], include=True) == ("abc", "bc")


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc", max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=6),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_nothing_of_a_stop_text_is_ever_shown(text: str, cuts: list[int], stops: list[str]) -> None:
    """What is shown is the text before the stop that is complete first, however it is cut."""
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    parts = [text[a:b] for a, b in pairwise(edges)]
    shown, matched = run_stops(parts, stops)
    if matched is None:
        assert shown == text and not any(stop in text for stop in stops)
    else:
        assert text.startswith(shown + matched)
        assert not any(stop in shown for stop in stops)
