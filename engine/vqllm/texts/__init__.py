"""Text that ships with the package, and the command that made it."""
