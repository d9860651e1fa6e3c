"""What is measured: alignment with the teacher on held-out rows.

``measures`` for any model and split, ``teacher`` for a teacher whose distribution is known.
"""
