"""The equations of LoRA in NumPy: nothing in here imports anything of minilora outside here."""
