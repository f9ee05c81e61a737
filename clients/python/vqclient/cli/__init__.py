"""The command line `vqclient`. The environment (VQCLIENT_*) is read here only."""

from vqclient.cli.app import app, main

__all__ = ["app", "main"]
