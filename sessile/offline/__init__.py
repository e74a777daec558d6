"""The engine without HTTP, in the process that calls it: `LLM` for scripts and notebooks, `AsyncLLM` for asyncio."""
