"""The vqstack services: tokenizerd (`vqserve.tokenizer`) and llmd (`vqserve.generation`)."""
