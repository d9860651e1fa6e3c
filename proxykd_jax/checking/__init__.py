"""What can be known of a run before it starts: data, models, steps, memory and time."""

from proxykd_jax.checking.checks import check_start, dry_run, full_check, judge_corpus

__all__ = ["check_start", "dry_run", "full_check", "judge_corpus"]
