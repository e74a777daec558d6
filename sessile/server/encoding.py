"""Text to token ids without holding up the event loop."""

import asyncio

from sessile.server.body import THREAD_BYTES
from sessile.text.tokenizer import Tokenizer


async def encode_text(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of text; a long one is encoded in a thread (the encoder releases the interpreter lock)."""
    if len(text) > THREAD_BYTES:
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)
