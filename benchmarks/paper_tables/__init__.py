"""The paper's tables on the miniature, whose teacher is known, over many seeds at once.

    python -m benchmarks.paper_tables --out runs/paper_tables [--quick]

The teacher is a black box to every method: methods see its sampled text. Only ``metrics`` and the
method ``teacher_logits`` read its distribution.

The phases, objectives, batches and orders are the product's; this package runs them on all seeds at
once. ``settings`` holds the sizes and the configs. ``seeds`` makes worlds, corpora and splits.
``vectorise`` runs a function of one seed on all seeds. ``training`` takes the product's phases.
``proxies`` aligns the proxies. ``methods`` lists the students, which ``offline``, ``on_policy``,
``mixing`` and ``adversarial`` train. ``statistics``, ``tables`` and ``figures`` write the results.

Array names have these axes beside those of ``proxykd_jax``: S seeds, Z steps, N rows, P tokens of
a prompt, T tokens of an answer.
"""
