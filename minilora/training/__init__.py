"""Fine-tuning on a CPU: data, gradients, the loop, checkpoints, generation and evaluation."""
