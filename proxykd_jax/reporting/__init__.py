"""A run, or several, as one HTML page: what a person wants to look at, read from the files alone.

``read_run`` reads a folder, ``sections`` say what is in it, ``render`` writes the page. No model is
loaded and nothing is computed that a stage has not stored; what a run lacks is said in its place.
"""
