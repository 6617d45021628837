"""From scans of digits to a miniature Emu3 that draws and describes them, measured."""
