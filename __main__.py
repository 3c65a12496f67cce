"""``python -m tokenmill`` is the command line."""

from .cli import main

main()
