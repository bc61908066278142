"""Reports of many libraries and releases, kept as short files and shown on one page."""
