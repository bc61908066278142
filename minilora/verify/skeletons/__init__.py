"""What a library needs to be verified: adapter, test, file of known deviations, workflow."""

from minilora.verify.skeletons.skeleton import KINDS, skeleton

__all__ = ["KINDS", "skeleton"]
