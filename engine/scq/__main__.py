"""`python -m scq` is the command line `scq`."""

from scq.cli import main

main()
