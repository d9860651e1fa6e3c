"""Measurements of the library: the miniature in which the teacher is known, and its tables."""
