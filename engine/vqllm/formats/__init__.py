"""How quantized linears lie in a model folder: one module per `quant_method` of config.json."""
