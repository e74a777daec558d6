"""Corpora outside a server: texts to token ids to index files, the process that does it for a server, the client."""
