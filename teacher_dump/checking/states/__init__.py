"""How the hidden states that a dump keeps, or what was pooled of them, are checked."""
