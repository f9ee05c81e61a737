"""A small llama trained here, whose weights lie on no quantization grid.

The weights that `vqllm fetch smollm2` brings were dequantized from 4-bit blocks of 32, so scalar
results on them can flatter or punish a method. This model is the second reference.
"""
