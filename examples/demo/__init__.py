"""The demonstration behind `make demo`, `make serve` and `make load`.

A client of the two services: it starts them as separate processes and talks to them through
`vqclient`, as any user would. It knows the engines only by their commands.
"""
