"""What crosses a boundary: plans and results (core ⇄ device), messages (server ⇄ engine). Data only, numpy at most."""
