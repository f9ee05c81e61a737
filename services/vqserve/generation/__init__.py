"""llmd: text generation by quantized language models over gRPC and the OpenAI HTTP routes.

`request` is the vocabulary, `core` the behaviour, `driver` the engine's thread; `service` and
`openai` are the two protocols over the same core.
"""
