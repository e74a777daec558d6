"""Functions of tensors that do the heavy work, each with a plain-torch twin in `reference`. They know no requests."""
