"""Training: a validated recipe, the data it names, and a run over the sentence-transformers trainer."""
