"""Evaluation of a model: reconstruction, generation, answers and perplexity."""
