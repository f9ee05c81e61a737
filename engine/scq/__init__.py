"""Soft Convex Quantization: images to a few hundred bytes of codes, and back.

Knows nothing of gRPC, HTTP, protobuf or the environment, and never imports vqllm.
"""
