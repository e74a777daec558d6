"""Text at the edge of the engine: tokenizer, vocabulary as bytes, incremental detokeniser, chat template, answers.

No torch.
"""
