"""The miniature Emu3: trained on scans of digits, it generates and captions them; measured."""
