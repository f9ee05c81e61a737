"""An open-loop load generator for both services.

Requests leave when their schedule says so, whatever is still outstanding, and latency counts
from the scheduled time: a server that falls behind cannot hide its queue (coordinated omission).
Talks to loopback only. Knows the public contract through vqclient and HTTP; imports no engine.
"""
