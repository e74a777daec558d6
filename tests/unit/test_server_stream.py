"""Server-sent events as clients read them."""

import httpx
import orjson
import pytest

from sessile.server.stream import event

BREAKS = "\n \r \x0b \x0c \x1c \x1d \x1e \x85 \u2028 \u2029"


@pytest.mark.parametrize("character", BREAKS.split(" "), ids=ascii)
def test_an_event_is_one_line_whatever_its_text_and_whoever_splits_it(character: str) -> None:
    content = {"text": f"before{character}behind", "n": 1}
    sent = event(content)
    lines = [line for line in httpx.Response(200, content=sent).iter_lines() if line]
    assert lines == [sent.decode().rstrip("\n")]
    assert orjson.loads(lines[0].removeprefix("data: ")) == content
