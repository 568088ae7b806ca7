"""``python -m ccg_training`` is the command ``ccg``."""

from .cli import main

main()
