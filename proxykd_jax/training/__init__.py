"""Steps, loop, optimizer, checkpoints and metrics: what the training stages share."""
