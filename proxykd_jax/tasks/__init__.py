"""Benchmarks: their items, the models' answers to them, and how the answers are scored."""
