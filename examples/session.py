"""A session whose turns compute only what is new, a fork of it, and steps back: `python examples/session.py`."""

from sessile import LLM


def main() -> None:
    """Take turns, fork, rewind."""
    with LLM(model="default", context_tokens=1024) as llm, llm.session() as session:
        session.append("The capital of France is Paris.")
        turn = session.generate(" The capital of Italy is", max_new_tokens=4, temperature=0)
        print(turn.text, f"({turn.cached_tokens} of {turn.prompt_tokens} tokens were there)")

        # Both go on from the same history and share its KV; neither sees what the other says from now on.
        with session.fork() as fork:
            print(fork.generate(" The capital of Spain is", max_new_tokens=4, temperature=0).text)

        # A turn that is left early is rolled back: the history is what it was.
        before = session.tokens()
        for piece in session.stream(" Once upon a time", max_new_tokens=64):
            print(piece.text)
            break
        assert session.tokens() == before

        session.rewind(to_turn=1)
        print(f"{len(session.tokens())} tokens are left of {len(before)}")


if __name__ == "__main__":
    main()
