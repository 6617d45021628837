"""The command line, one file for each group of commands."""

# Importing a group adds its commands, in the order of the help.
from emu3.cli import training, generate, chat, serve, files, curate, data  # noqa: F401, I001
from emu3.cli import prefer, profiling, evaluate  # noqa: F401
from emu3.cli.common import app

__all__ = ["app"]
