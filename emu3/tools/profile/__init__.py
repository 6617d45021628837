"""Where the time of a prefill and of a decode goes, at contexts from 1,024 to 131,072 tokens."""
