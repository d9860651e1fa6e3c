"""Measurements of the library: the miniature whose teacher is known, its tables, and speed."""
