"""What the training stages share: steps, the loop, the optimizer, checkpoints and metrics."""
