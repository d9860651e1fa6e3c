"""A world small enough that the teacher's true distribution is known.

``world`` is the teacher and the public text; ``pretrain`` makes a proxy and a student from the
public text; ``make`` writes the files that the commands of ``proxykd_jax`` take; ``measure`` and
``report`` compare what comes out of them with the truth.
"""
