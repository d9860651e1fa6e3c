"""prepare on Apache Beam: the corpus that one machine would make, to the byte, made by many.

The order in which rows are read is what decides between them: of repeated rows the first stays,
and a row's place among those of its split decides its shard. So every row has a key, the piece
(file) it is in and its number there, and the steps below compare keys instead of waiting for one
another. Between the steps stand small columns in a folder that all workers see (``job.py``): at
most 60 bytes a row, never its text.

1. ``scan``: every piece is read; of each row digests, its places for the split, and whether it
   holds a benchmark question are kept.
2. ``judge``: digests are grouped; all but the smallest key of a digest are repeated rows.
3. ``limit``, where ``max_rows`` is set: the smallest hashes of rows that fit, piece by piece.
4. ``assign``: the number of rows is known, so the validation fraction is; every row has its split.
5. ``write``: pieces are read again and cut into tokens; rows meet at their shard, whose number
   follows from the rows of that split in earlier pieces. One worker sorts and writes it, whole.

``pipelines.py`` alone knows Beam, and imports it where it is asked for. ``make.py`` leads.
"""
