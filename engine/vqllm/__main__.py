"""`python -m vqllm` is the `vqllm` command."""

from vqllm.cli import main

main()
