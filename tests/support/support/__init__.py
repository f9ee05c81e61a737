"""What several test folders share: services as real processes, tiny models, fake executors."""
