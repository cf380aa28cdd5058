"""LoRATrainer: batches, optimizer, checkpoints, processes, the start along the gradient."""
