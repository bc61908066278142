"""What every check stands on: types, tolerances, drawn inputs, shrinking."""
