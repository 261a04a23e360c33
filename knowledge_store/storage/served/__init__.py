"""A store that is served: where it is, what is asked of its server, by whom, and its files as any other storage's."""
