"""The corpus: from files of a teacher's answers to batches of tokens."""
