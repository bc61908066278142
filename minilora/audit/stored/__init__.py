"""Adapters as their files hold them, by names and shapes alone: without a base, of any model."""
