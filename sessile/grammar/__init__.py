"""Grammars of outputs: JSON schemas, regular expressions and EBNF, compiled and followed by llguidance."""
