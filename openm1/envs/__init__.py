"""Tasks that grade themselves. Reading order: base, chain, hop, logic, catalog,
mixture, genrm."""
