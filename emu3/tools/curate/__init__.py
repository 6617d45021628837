"""Images and videos to scores, decisions and captions: ``emu3 curate``."""
