"""What quantizing and running a model will cost, before anything is downloaded or run."""
