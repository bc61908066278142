"""Right implementations in straight source text, which the catalogue's mutants edit."""
