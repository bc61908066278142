"""What a library needs to be verified: an adapter, a test, a file of what is known, a workflow."""

from minilora.verify.skeletons.skeleton import KINDS, skeleton

__all__ = ["KINDS", "skeleton"]
