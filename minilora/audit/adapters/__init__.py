"""Adapters as the files of each library have them, by the names of a base's tensors."""
