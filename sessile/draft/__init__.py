"""Model-free speculation: drafts looked up in the sequence itself, in a tenant's history and in live corpora."""
