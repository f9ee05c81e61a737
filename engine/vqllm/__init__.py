"""vqllm: quantizes Hugging Face language models and runs them.

Imports no transport and reads no environment variables. The heavy parts (torch, ONNX Runtime) are
imported by the modules that need them, so `import vqllm` is cheap.
"""
