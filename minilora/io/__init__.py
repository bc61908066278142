"""Files: the formats of other libraries, opening a model, the reference models, synthetic tasks."""
