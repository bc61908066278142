"""A grid of runs over rank, alpha, learning rate and seed: grid, run, results."""
