"""Test vectors: the cases of the checks as files for any language."""
