"""Tuning of scales, codebooks and norms after quantization, by distillation; codes stay."""
