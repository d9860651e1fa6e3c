"""Tables of the paper "Knowledge Distillation of Black-Box Large Language Models".

Accuracies are in percent, in the order of ``BENCHMARKS``; None where the paper prints a dash.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

BENCHMARKS = ("AGIEval", "ARC", "BBH", "CSQA", "GSM8K", "MMLU")


@dataclass(frozen=True)
class PaperRow:
    """A row of a table of accuracies.

    Attributes:
      group: the heading above the row.
      method, student, teacher: its first columns.
      scores: by benchmark.
      printed: the average that the paper prints.
      proxy: a column of Table 5 only.
    """

    group: str
    method: str
    student: str
    teacher: str
    scores: tuple[float | None, ...]
    printed: float | None = None
    proxy: str | None = None

    @property
    def average(self) -> float | None:
        """The mean of the six scores; None where one is missing."""
        return average(self.scores)

    @property
    def misprinted(self) -> bool:
        """Whether the printed average does not match the row (apart from rounding)."""
        mean = self.average
        return mean is not None and self.printed is not None and abs(mean - self.printed) > 0.05


def average(scores: tuple[float | None, ...]) -> float | None:
    """The mean; None if a score is missing."""
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known and len(known) == len(scores) else None


_WHITE, _BLACK, _TEACHER = "White-box KD", "Black-box KD", "Black-box teacher"
TABLE_1 = (
    PaperRow(_TEACHER, "GPT-4", "–", "–", (56.40, 93.26, 88.0, None, 92.0, 86.4)),
    PaperRow(_WHITE, "Forward KL", "Llama-1-7B", "Llama-2-70B-Chat",
             (25.16, 62.18, 37.27, 74.20, 37.39, 45.43), 46.94),
    PaperRow(_WHITE, "Forward KL", "Llama-2-7B", "Llama-2-70B-Chat",
             (35.16, 66.87, 35.68, 74.40, 44.12, 51.42), 51.27),
    PaperRow(_WHITE, "Forward KL", "Llama-2-7B", "Llama-2-70B-Proxy",
             (35.56, 69.34, 45.72, 74.97, 46.34, 51.13), 53.84),
    PaperRow(_WHITE, "MiniLLM", "Llama-2-7B", "Llama-2-70B-Chat",
             (35.77, 63.25, 53.11, 75.15, 44.64, 51.32), 53.87),
    PaperRow(_WHITE, "GKD", "Llama-2-7B", "Llama-2-70B-Chat",
             (34.22, 62.28, 52.58, 75.16, 42.79, 50.64), 52.95),
    PaperRow(_BLACK, "Black-Box KD", "Llama-1-7B", "GPT-4",
             (28.01, 63.17, 41.98, 74.43, 41.83, 45.21), 49.11),
    PaperRow(_BLACK, "Black-Box KD", "Llama-2-7B", "GPT-4",
             (34.71, 66.85, 46.68, 74.43, 49.51, 49.82), 53.66),
    PaperRow(_BLACK, "Mentor-KD", "Llama-2-7B", "GPT-4",
             (35.49, 70.14, 51.33, 75.16, 52.11, 50.13), 55.73),
    PaperRow(_BLACK, "TAKD", "Llama-1-7B", "GPT-4",
             (26.74, 64.31, 39.55, 72.01, 40.49, 38.78), 46.98),
    PaperRow(_BLACK, "TAKD", "Llama-2-7B", "GPT-4",
             (35.46, 68.31, 49.41, 74.52, 49.49, 48.12), 53.22),
    PaperRow(_BLACK, "Proxy-KD", "Llama-1-7B", "GPT-4",
             (35.47, 67.48, 43.74, 74.08, 44.89, 41.88), 52.09),
    PaperRow(_BLACK, "Proxy-KD", "Llama-2-7B", "GPT-4",
             (36.59, 71.09, 53.40, 75.18, 53.07, 51.35), 56.78),
)  # fmt: skip

_STUDENT, _PROXY = "Student", "Proxy"
TABLE_2 = (
    PaperRow(_STUDENT, "Proxy-KD", "Llama-2-7B", "GPT-4",
             (36.59, 71.09, 53.40, 75.18, 53.07, 51.35)),
    PaperRow(_STUDENT, "without the proxy", "Llama-2-7B", "GPT-4",
             (34.71, 66.85, 46.68, 74.43, 49.51, 49.82)),
    PaperRow(_STUDENT, "without alignment", "Llama-2-7B", "GPT-4",
             (35.05, 67.18, 43.0, 76.04, 47.54, 48.09)),
    PaperRow(_STUDENT, "without the preference loss", "Llama-2-7B", "GPT-4",
             (35.38, 66.11, 52.51, 75.51, 52.49, 48.79)),
    PaperRow(_STUDENT, "without the weights", "Llama-2-7B", "GPT-4",
             (33.99, 71.81, 51.50, 75.11, 52.91, 49.47)),
    PaperRow(_PROXY, "aligned", "Llama-2-70B", "GPT-4",
             (49.12, 87.67, 66.04, 82.18, 78.24, 68.62)),
    PaperRow(_PROXY, "without the preference loss", "Llama-2-70B", "GPT-4",
             (48.79, 87.11, 64.87, 81.33, 78.56, 66.94)),
    PaperRow(_PROXY, "without both", "Llama-2-70B", "GPT-4",
             (48.31, 86.93, 62.16, 80.95, 79.15, 66.38)),
)  # fmt: skip

# Figure 3 prints no numbers. Its bars of the 70B are rows of Table 2.
FIGURE_3 = tuple(dataclasses.replace(TABLE_2[place], proxy="Llama-2-70B") for place in (5, 0))

# (model and method, GPUs, hours for 40,000 samples)
TABLE_3 = (
    ("Llama-7B-SFT", 4, 1.0),
    ("Llama-7B-Distill", 4, 2.0),
    ("Llama-7B-GKD", 8, 10.0),
    ("Llama-13B-SFT", 8, 1.8),
    ("Llama-13B-Pref", 8, 9.0),
    ("Llama-70B-SFT", 8, 5.5),
    ("Llama-70B-Pref", 8, 28.0),
)
SAMPLES_A_ROUND = 40_000

# KL(teacher || proxy): 1.53 raw, 0.87 by NLL, 0.56 by NLL and preference. Here are the differences,
# under the run's models that correspond most closely.
TABLE_4_STEPS = {
    ("proxy_aligned", "proxy_raw"): 0.56 - 1.53,
    ("proxy_warmup", "proxy_raw"): 0.87 - 1.53,
    ("proxy_aligned", "proxy_warmup"): 0.56 - 0.87,
}

TABLE_5 = (
    PaperRow("Qwen", "Forward KL", "Qwen-2.5-7B", "Qwen-2.5-32B",
             (51.34, 85.33, 58.94, 75.12, 70.11, 68.34), 68.20, "–"),
    PaperRow("Qwen", "Black-Box KD", "Qwen-2.5-7B", "GPT-4",
             (52.88, 86.53, 66.35, 74.59, 73.47, 70.35), 70.70, "–"),
    PaperRow("Qwen", "Proxy-KD", "Qwen-2.5-7B", "GPT-4",
             (53.11, 89.64, 69.37, 75.21, 74.56, 71.28), 72.20, "Qwen-2.5-32B"),
)  # fmt: skip
