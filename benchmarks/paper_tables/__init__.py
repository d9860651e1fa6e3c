"""The paper's tables in a miniature whose teacher is known, over many seeds at once.

    python -m benchmarks.paper_tables --out runs/paper_tables [--quick]

To every method the teacher is a black box: only sampled text is passed on. Its distribution is
seen by ``metrics`` alone. ``settings`` says how large everything is; ``seeds`` makes the worlds,
the corpus and its splits; ``vectorise`` runs a function of one seed over all; ``training`` holds
the product's steps; ``proxies`` aligns, ``methods`` and ``on_policy`` make the students;
``statistics``, ``tables`` and ``figures`` say what came out.

Axes beside those of ``proxykd_jax``: S seeds, Z steps, N rows, P prompt, T answer.
"""
