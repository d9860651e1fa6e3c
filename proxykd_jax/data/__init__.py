"""Rows as tokens: the corpus and the soft labels on disk, the order of an epoch, and batches."""
