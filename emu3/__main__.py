"""``python -m emu3`` is the command line."""

from emu3.cli import app

app(prog_name="emu3")
