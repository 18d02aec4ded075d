"""Proof on the user's machine that the tool cannot be fooled in the known ways."""
