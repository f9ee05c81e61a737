"""Interchangeable ways to run a model: logits for tokens, with a KV cache per sequence."""
