"""[Data] interactions, catalogue, splits, sampling, sources, and the planted world."""
