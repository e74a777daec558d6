"""`sessile chat`: conversations in a terminal, or read from a pipe, each over one streaming session of a server."""
