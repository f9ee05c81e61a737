"""Token generation: sequences, sampling, the stepping engine and its executors.

Knows nothing of transport, threads or clocks: one owner calls `Engine.step` in a loop.
"""
