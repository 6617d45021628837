"""Images, videos, texts and conversations to a token store: ``emu3 prepare``."""
