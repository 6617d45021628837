"""Long jobs over many files or many calls: tokenize, detokenize, compare, profile."""
