"""Text deltas: whole characters, and no stop string."""

from vqllm.runtime.detokenizer import Detokenizer


class Pieces:
    """Token i stands for the i-th of the given byte strings."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces

    def token_bytes(self, token_id: int) -> bytes:
        return self._pieces[token_id]


def deltas(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], str, bool]:
    """Deltas per token, the flush, and whether a stop string ended it."""
    detokenizer = Detokenizer(Pieces(*pieces), stop)
    texts = [detokenizer.push(token) for token in range(len(pieces))]
    return texts, detokenizer.flush(), detokenizer.is_stopped


def test_a_character_comes_out_with_its_last_byte() -> None:
    first, second, third, fourth = (bytes([byte]) for byte in "🙂".encode())
    texts, rest, _ = deltas([b"a", first, second, third, fourth])
    assert texts == ["a", "", "", "", "🙂"]
    assert rest == ""


def test_half_a_character_at_the_end_becomes_a_replacement() -> None:
    texts, rest, _ = deltas([b"ab", "é".encode()[:1]])
    assert texts == ["ab", ""]
    assert rest == "\ufffd"


def test_a_stop_string_across_tokens_never_shows() -> None:
    texts, rest, stopped = deltas([b"one E", b"N", b"D two"], stop=("END",))
    assert "".join(texts) + rest == "one "
    assert stopped


def test_text_that_only_looked_like_a_stop_string_is_released() -> None:
    texts, rest, stopped = deltas([b"E", b"N", b"x"], stop=("END",))
    assert texts == ["", "", "ENx"]
    assert (rest, stopped) == ("", False)


def test_held_text_is_flushed_at_the_end() -> None:
    texts, rest, _ = deltas([b"say EN"], stop=("END",))
    assert texts == ["say "]
    assert rest == "EN"


def test_the_earliest_of_several_stop_strings_wins() -> None:
    texts, rest, stopped = deltas([b"a b c"], stop=("c", "b"))
    assert texts == ["a "]
    assert (rest, stopped) == ("", True)


def test_nothing_follows_a_stop_string() -> None:
    texts, rest, _ = deltas([b"a.", b"more"], stop=(".",))
    assert texts == ["a", ""]
    assert rest == ""
