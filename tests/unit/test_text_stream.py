"""Text as it streams: exact when joined, no half character, nothing that a stop string would take back."""

import time
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessile.text.detokenise import TextStream
from sessile.text.load import load_tokenizer
from sessile.text.vocabulary import Vocabulary, byte_fallback_bytes, byte_level_bytes

BYTES = Vocabulary.build({**{byte: bytes([byte]) for byte in range(256)}, 256: b"<end>", 300: b"ab"}, [256])
"""One token a byte, a special one, and one of two bytes behind a gap."""


def pieces(stream: TextStream, tokens: Iterable[int]) -> list[str]:
    return [*(stream.push([token]) for token in tokens), stream.finish()]


@given(st.lists(st.integers(0, 320), max_size=60), st.booleans())
def test_the_pieces_joined_are_the_text_of_all_tokens(tokens: list[int], skip: bool) -> None:
    stream = TextStream(BYTES, skip_special_tokens=skip)
    expected = BYTES.join(tokens, skip_special_tokens=skip).decode(errors="replace")
    assert "".join(pieces(stream, tokens)) == expected


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.lists(st.integers(1, 9), min_size=40))
def test_no_piece_holds_half_a_character(text: str, sizes: list[int]) -> None:
    stream = TextStream(BYTES)
    raw, found = text.encode(), ""
    for size in sizes:
        found += stream.push(raw[:size])
        raw = raw[size:]
        assert text.startswith(found)
    assert found + stream.finish(raw) == text


def test_half_a_character_at_the_end_becomes_a_replacement() -> None:
    stream = TextStream(BYTES)
    assert stream.push("é".encode()[:1]) == ""
    assert stream.finish() == "\ufffd"


def test_special_tokens_show_only_where_asked_for() -> None:
    assert TextStream(BYTES).finish([97, 256, 98]) == "ab"
    assert TextStream(BYTES, skip_special_tokens=False).finish([97, 256, 98]) == "a<end>b"


def test_tokens_outside_the_vocabulary_add_nothing() -> None:
    assert TextStream(BYTES).finish([97, 280, 5000, 98]) == "ab"


def test_text_that_may_start_a_stop_is_held_back_until_it_does_not() -> None:
    stream = TextStream(BYTES, stops=[b"STOP"])
    assert [stream.push([byte]) for byte in b"a STOX"] == ["a", " ", "", "", "", "STOX"]


def test_text_held_back_is_sent_if_the_output_ends_otherwise() -> None:
    stream = TextStream(BYTES, stops=[b"STOP"])
    assert stream.push(b"so STO") == "so "
    assert stream.finish() == "STO"


def test_the_output_is_cut_where_the_stop_begins() -> None:
    stream = TextStream(BYTES, stops=[b"STOP"])
    assert stream.push("é ST".encode()) == "é "
    assert stream.finish(b"OP and on", kept_bytes=3) == ""


def test_the_earliest_of_several_stops_is_cut_though_it_came_in_one_token_run() -> None:
    stream = TextStream(BYTES, stops=[b"\n\n", b"User:"])
    assert stream.push(b"fine\n") == "fine"
    assert stream.finish(b"User: hi\n\n", kept_bytes=5) == "\n"


@given(
    st.lists(st.sampled_from([b"a", b"b", b"ab", b"aab", "é".encode(), "é".encode()[:1]]), max_size=25),
    st.lists(st.sampled_from([b"aa", b"aab", b"abab", "éa".encode(), "bé".encode(), b"a"]), max_size=3),
)
def test_a_stop_wherever_it_falls_leaves_exactly_what_came_before_it(parts: list[bytes], stops: list[bytes]) -> None:
    whole = b"".join(parts)
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    end, kept = min(ends, default=(len(whole) + 1, -1))
    kept = min((start for stop_end, start in ends if stop_end == end), default=kept)
    stream, found, taken = TextStream(BYTES, stops=stops), "", 0
    for part in parts:
        taken += len(part)
        if taken >= end:
            found += stream.finish(part, kept_bytes=kept)
            break
        found += stream.push(part)
        sent = len(found.encode(errors="replace")) if "\ufffd" not in found else 0
        assert kept < 0 or sent <= kept, "sent what the stop takes back"
    else:
        found += stream.finish()
    expected = whole if kept < 0 else whole[:kept]
    assert found == expected.decode(errors="replace")


def test_a_cut_before_what_was_sent_is_a_bug_that_is_caught() -> None:
    stream = TextStream(BYTES)
    stream.push(b"sent")
    with pytest.raises(AssertionError, match="outside the text"):
        stream.finish(kept_bytes=2)


def test_a_token_costs_the_same_however_long_the_text() -> None:
    tokenizer = load_tokenizer("default")
    tokens = tokenizer.encode("The quick brown fox jumps over the lazy dog, 日本語. " * 1500)
    stream = tokenizer.stream(stops=[b"never", b"\n\nUser:"])
    half, times = len(tokens) // 2, []
    for run in (tokens[:half], tokens[half:]):
        started = time.process_time()
        for token in run:
            stream.push((token,))
        times.append(time.process_time() - started)
    assert times[1] < 3 * times[0] + 0.05


@pytest.mark.parametrize(
    ("token", "expected"), [("Ġa", b" a"), ("Ċ", b"\n"), ("Ã©", "é".encode()), ("é", b"\xe9"), ("日", "日".encode())]
)
def test_byte_level_tokens_spell_bytes(token: str, expected: bytes) -> None:
    assert byte_level_bytes(token) == expected


@pytest.mark.parametrize(
    ("token", "expected"),
    [("▁a", b" a"), ("<0x0A>", b"\n"), ("<0xFF>", b"\xff"), ("<0xZZ>", b"<0xZZ>"), ("日", "日".encode())],
)
def test_byte_fallback_tokens_are_text_or_one_byte(token: str, expected: bytes) -> None:
    assert byte_fallback_bytes(token) == expected
