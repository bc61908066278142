"""What LoRA is said to bring, measured: each claim with its criterion, its figures and a verdict.

The reference models go from the first task that they know to a second one that contradicts it, by
full fine-tuning and by LoRA, over the same grid of learning rates with the same seeds. Both tasks'
entropies are known, so that a loss's excess is a Kullback-Leibler divergence, without sampling
error.

A real model, where one is installed, goes from what it knows to the reference of Python's language,
which comes with Python. What it knows is its own distribution: on text drawn from the base, the
mean loss less the base's own is an estimate of the divergence from the base, and needs no other
data. Of each next token that divergence is summed over the whole vocabulary, so that only the
contexts are a sample; every seed draws its own, the text held out too, so that intervals over seeds
hold the sampling error, and all sides are compared on the same.
"""
