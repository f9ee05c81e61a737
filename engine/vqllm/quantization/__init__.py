"""Quantization methods behind one result type, and the pipeline that runs them over a model."""
