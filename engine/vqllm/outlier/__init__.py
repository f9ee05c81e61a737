"""Changes to the weights that keep a model's function and make it easier to quantize."""
