"""What a model's output means: its reasoning, its words to the user, and its calls of tools, read as it comes."""
