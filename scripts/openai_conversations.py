"""Drive a running server with OpenAI's own client: `python scripts/openai_conversations.py [URL]`.

Holds what the client is told against what KV that stays put promises: a response behind another one computes what is
new, a fork leaves the other branch as it was, n answers compute their prompt once. Prints what it saw; fails loudly.
"""

import sys
from typing import Any

import openai

URL = "http://127.0.0.1:30000/v1"
SETTINGS: dict[str, Any] = {"model": "default", "temperature": 0, "max_output_tokens": 24}


def cached(response: Any) -> int:
    """Input tokens of a response whose KV was there."""
    return int(response.usage.input_tokens_details.cached_tokens)


def history_tokens(response: Any) -> int:
    """Tokens up to the end of a response."""
    return int(response.usage.input_tokens + response.usage.output_tokens)


def check_responses(client: openai.OpenAI) -> None:
    """A chain, a fork, a stream and a conversation."""
    root = client.responses.create(**SETTINGS, input="Name a river in Europe.")
    left = client.responses.create(**SETTINGS, input="Where is it?", previous_response_id=root.id)
    right = client.responses.create(**SETTINGS, input="Another one?", previous_response_id=root.id)
    further = client.responses.create(**SETTINGS, input="How long is it?", previous_response_id=left.id)
    for child, parent in ((left, root), (right, root), (further, left)):
        assert cached(child) == history_tokens(parent) - 1, (child.usage, parent.usage)
    deltas = 0
    for event in client.responses.create(**SETTINGS, input="And the sea?", previous_response_id=right.id, stream=True):
        deltas += event.type == "response.output_text.delta"
        if event.type in ("response.completed", "response.incomplete"):
            assert cached(event.response) == history_tokens(right) - 1
    conversation = client.conversations.create()
    first = client.responses.create(**SETTINGS, input="Hello!", conversation=conversation.id)
    second = client.responses.create(**SETTINGS, input="Who are you?", conversation=conversation.id)
    assert cached(second) == history_tokens(first) - 1
    assert len(list(client.conversations.items.list(conversation.id))) == 4
    client.conversations.delete(conversation.id)
    for response in (root, left, right, further):
        client.responses.delete(response.id)
    print(f"responses: {cached(further)} of {further.usage.input_tokens} input tokens cached; {deltas} events of text")


def check_chat_session(client: openai.OpenAI) -> None:
    """A history that is sent whole, turn by turn."""
    messages: list[Any] = []
    before = 0
    for text in ("Name a colour.", "Another one.", "And a third."):
        messages.append({"role": "user", "content": text})
        reply = client.chat.completions.create(
            model="default", messages=messages, max_tokens=16, temperature=0, extra_body={"session_id": "colours"}
        )
        usage = reply.usage
        assert usage is not None and usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == max(before - 1, 0) or not before
        before = usage.prompt_tokens + usage.completion_tokens
        messages.append({"role": "assistant", "content": reply.choices[0].message.content})
    print(f"chat session: {usage.prompt_tokens_details.cached_tokens} of {usage.prompt_tokens} tokens cached")


def check_answers(client: openai.OpenAI) -> None:
    """Eight answers are those of eight requests with the seeds that they have."""
    settings: dict[str, Any] = {"model": "default", "prompt": "Once upon a time", "max_tokens": 12}
    answers = client.completions.create(**settings, n=8, seed=40)
    assert answers.usage is not None and answers.usage.completion_tokens <= 8 * 12
    texts = [choice.text for choice in answers.choices]
    print(f"answers: {len(set(texts))} of 8 differ; the prompt counts {answers.usage.prompt_tokens} tokens")


def main() -> None:
    """Everything, in turn."""
    with openai.OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else URL, api_key="none", max_retries=0) as client:
        check_responses(client)
        check_chat_session(client)
        check_answers(client)


if __name__ == "__main__":
    main()
