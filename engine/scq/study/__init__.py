"""Studies: what the published method left open, answered at measured bytes and equal budgets."""
