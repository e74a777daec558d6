"""Sessile: a serving engine for language models in which a conversation's KV cache stays put.

`from sessile import LLM` runs a model in this process, `AsyncLLM` does so for asyncio, `Client` and `AsyncClient` talk
to a server. Each is imported when it is first named: importing the package loads nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sessile.client.async_client import AsyncClient, AsyncClientSession
    from sessile.client.sync_client import Client, ClientSession
    from sessile.completion import Completion, Generation, Piece, SamplingParams, TokenLogprob
    from sessile.offline.async_llm import AsyncLLM, AsyncSession
    from sessile.offline.llm import LLM, Session

__version__ = "0.1.0"

__all__ = [
    "LLM", "AsyncClient", "AsyncClientSession", "AsyncLLM", "AsyncSession", "Client", "ClientSession", "Completion",
    "Generation", "Piece", "SamplingParams", "Session", "TokenLogprob",
]  # fmt: skip

_HOMES = {
    "client": ("AsyncClient", "AsyncClientSession", "Client", "ClientSession"),
    "completion": ("Completion", "Generation", "Piece", "SamplingParams", "TokenLogprob"),
    "offline.async_llm": ("AsyncLLM", "AsyncSession"),
    "offline.llm": ("LLM", "Session"),
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home. Called by Python for what the package does not have yet."""
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = value = getattr(import_module(f"sessile.{home}"), name)
            return value
    raise AttributeError(f"module 'sessile' has no attribute {name!r}")
