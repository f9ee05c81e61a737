"""Other people's quantizers, run as they are on our reference weights and scored by our harness."""
