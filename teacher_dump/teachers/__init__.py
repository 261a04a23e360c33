"""Teachers: what the pass asks of one (`protocol`), and those that run on this machine (`local`). Nothing here reads a corpus."""
