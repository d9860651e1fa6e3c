"""prepare on Apache Beam: many workers make the same corpus, byte for byte, as one machine.

The reading order decides between rows: the first of repeated rows stays, and a row's rank in its
split decides its shard. So every row has a key, its piece (file) and its number in the piece, and
the steps below compare keys instead of waiting for one another. Between steps, small columns lie in
a folder that all workers see (``job.py``): at most 60 bytes per row, and never its text.

1. ``scan`` reads every piece. For each row it keeps digests, the two numbers that decide its split,
   and whether it contains a benchmark question.
2. ``judge`` groups digests. All rows of a digest but the one with the smallest key are repeated.
3. ``limit``, if ``max_rows`` is set, finds the smallest hashes of rows that fit, piece by piece.
4. ``assign``: the number of rows, and so the validation fraction, is now known; rows get splits.
5. ``write`` reads pieces again and tokenises them. Rows meet at their shard, whose number follows
   from the rows of that split in earlier pieces. One worker sorts and writes each shard.

Only ``pipelines.py`` uses Beam, and imports it on demand. ``make.py`` runs the steps.
"""
