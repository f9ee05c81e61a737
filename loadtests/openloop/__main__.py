"""`python -m openloop` is `python loadtests/run.py`."""

from openloop.cli import main

main()
