"""Parts of the LeviathanModelEnsemble: its configuration, coupling of a pair, fusion of modules."""
