"""/v1/responses and /v1/conversations: OpenAI's stored conversations, as branching sessions of the engine."""
