"""A world so small that the teacher's true distribution is known.

``world`` is the teacher and the public text. ``pretrain`` makes a proxy and a student from the
public text. ``make`` writes the files that the commands of ``proxykd_jax`` take. ``report``
compares the models that the commands make with the truth.
"""
