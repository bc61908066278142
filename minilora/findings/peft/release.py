"""The release of PEFT in which its findings were reproduced."""

SEEN = "0.21.2"
