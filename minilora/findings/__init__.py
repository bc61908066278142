"""Deviations of real libraries from the algebra: versions, conditions, effects, sources."""
