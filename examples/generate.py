"""Complete prompts, one and many, and answer a chat: `python examples/generate.py`."""

from sessile import LLM, SamplingParams


def main() -> None:
    """Load the embedded model, generate, give it back."""
    greedy = SamplingParams(temperature=0, max_new_tokens=12)
    with LLM(model="default", context_tokens=1024) as llm:
        completion = llm.generate("The capital of France is", greedy)
        print(completion.text, completion.finish_reason, f"{completion.prompt_tokens} tokens of prompt")

        # A list shares steps of the model, as many as fit; results are in the order of the prompts.
        prompts = [f"A short fact about the number {number}:" for number in range(1, 6)]
        for prompt, completion in zip(prompts, llm.generate(prompts, greedy), strict=True):
            print(prompt, completion.text)

        answer = llm.chat([{"role": "user", "content": "What is the opposite of hot?"}], greedy)
        print(answer.text)


if __name__ == "__main__":
    main()
