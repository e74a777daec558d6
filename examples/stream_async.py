"""Several outputs at a time, piece by piece, in asyncio: `python examples/stream_async.py`."""

import asyncio
from contextlib import aclosing

from sessile import AsyncLLM


async def tell(llm: AsyncLLM, beginning: str) -> str:
    """Print a story as it comes; all of it."""
    text = beginning
    async for piece in llm.generate(beginning, max_new_tokens=24, temperature=0.8, seed=1):
        print(f"{beginning!r} + {piece.text!r}")
        text += piece.text
    return text


async def main() -> None:
    """Tell three stories side by side, and leave a fourth one early."""
    async with AsyncLLM(model="default", context_tokens=1024) as llm:
        stories = await asyncio.gather(*(tell(llm, f"The {animal}") for animal in ("fox", "owl", "bear")))
        print(*stories, sep="\n")

        # Awaited, a generation is its completion. Closed, it ends at once.
        print((await llm.generate("Two and two is", max_new_tokens=4, temperature=0)).text)
        async with aclosing(llm.generate("Count: 1, 2, 3,", max_new_tokens=200)) as counting:
            async for piece in counting:
                print("left after", piece.tokens)
                break


if __name__ == "__main__":
    asyncio.run(main())
