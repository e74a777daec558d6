"""A session on a server, over HTTP: `sessile serve` in one terminal, `python examples/client.py` in another."""

import sys

from sessile import Client
from sessile.errors import InvalidRequest


def main(url: str = "http://127.0.0.1:30000") -> None:
    """Take turns on the server at url."""
    with Client(url) as client, client.session() as session:
        for piece in session.stream("The capital of France is", max_new_tokens=8, temperature=0):
            print(piece.text, end="", flush=True)
        print()
        turn = session.generate(" And the capital of Italy is", max_new_tokens=8, temperature=0)
        print(turn.text, f"({turn.cached_tokens} of {turn.prompt_tokens} tokens were there)")
        try:
            session.rewind(to_tokens=100_000)
        except InvalidRequest as error:
            print(f"refused: {error}")
        print([state.id == session.id for state in client.sessions()])


if __name__ == "__main__":
    main(*sys.argv[1:])
