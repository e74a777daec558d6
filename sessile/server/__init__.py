"""HTTP in front of an engine process: native (SGLang-compatible), OpenAI-compatible and session surfaces.

Follows one request: app.py routes it, a surface (generate.py, chat.py, completions.py, sessions.py) checks it, a Call
(calls.py) sends it over the link (link.py) and turns what comes back into text (output.py).
"""
