"""Teachers: the protocol, and one file for each engine that runs them."""
