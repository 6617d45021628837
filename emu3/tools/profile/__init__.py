"""Profile of a prefill and of a decode by op, at contexts from 1,024 to 131,072 tokens."""
