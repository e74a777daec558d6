"""Sessile: a serving engine for language models in which a conversation's KV cache stays put."""

__version__ = "0.1.0"
