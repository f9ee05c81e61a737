"""Scores of a model as it will run: through an executor, from the packed file."""
