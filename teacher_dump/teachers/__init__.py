"""Teachers: what the pass asks of one (`protocol`), and those of this machine (`files`, `local`). No corpus is read here."""
