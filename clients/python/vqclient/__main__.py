"""`python -m vqclient` is the command line `vqclient`."""

from vqclient.cli import main

main()
