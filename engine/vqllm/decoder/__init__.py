"""The decoder families in plain torch: configuration, weights and forward pass of a block."""
