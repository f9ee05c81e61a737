"""Run the load generator from a checkout: `python loadtests/run.py SCENARIO.toml ...`."""

from openloop.cli import main

if __name__ == "__main__":
    main()
