"""Draws answers from a model, and computes its log-probs of given answers.

``sampler``: batched decoding with a cache. ``samples``: a round's answers on disk. ``fresh_split``:
fresh prompts with the proxy's answers, read like a split of the corpus. ``label_batch``:
soft labels of a batch.
"""
