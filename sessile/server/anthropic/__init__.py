"""/v1/messages, as Anthropic's clients expect it: another surface over the same calls."""
