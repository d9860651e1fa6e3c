"""Shows one or several runs as one HTML page, made from the runs' files alone.

``read_run`` reads a folder, ``sections`` build the content, ``render`` writes the page. No model is
loaded, and nothing is computed that a stage has not stored. The page says what a run lacks.
"""
