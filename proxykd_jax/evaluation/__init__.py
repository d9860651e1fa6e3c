"""Measures how close a model is to the teacher on held-out rows.

``measures`` works for any model and split; ``exact_teacher`` is for a teacher whose distribution is
known.
"""
