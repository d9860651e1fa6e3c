"""Measures alignment with the teacher on held-out rows, and answers to benchmarks.

``measures`` works for any model and split; ``teacher`` is for a teacher whose distribution is
known.
"""
