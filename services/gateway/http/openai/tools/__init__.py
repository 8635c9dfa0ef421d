"""Tools: what a request says of them, the grammars that force a call, and calls found in text."""
