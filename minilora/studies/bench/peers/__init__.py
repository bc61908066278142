"""The other sides, each of which imports its library."""
