"""``python -m criadero``: the command line, where its script is not on the path."""

from criadero.cli import main

main()
