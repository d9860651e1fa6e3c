"""All students: what they learn from and how. They start from one model and take equal steps."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.paper_tables import adversarial, mixing, offline, on_policy
from benchmarks.paper_tables import proxies as px
from benchmarks.paper_tables.offline import ALL, DISTILL, FRESH, TRUTH, Material, Method, Source
from benchmarks.paper_tables.on_policy import OnPolicyMethod
from benchmarks.paper_tables.settings import Setting
from benchmarks.paper_tables.training import Run
from proxykd_jax.config.methods import MentorKd
from proxykd_jax.config.online_methods import Gkd, MiniLlm, OnPolicy
from proxykd_jax.types import TokenBatch

SODA, GAD = "soda", "gad"
PROXY_KD, BLACK_BOX, BLACK_BOX_ALL = "proxy_kd", "black_box_kd", "black_box_kd_all"
Any_Method = Method | OnPolicyMethod | str

# The methods by name: (label, group of the tables).
BASELINES, ABLATIONS, CONTROLS, BEYOND = "Table 1", "Table 2", "controls", "beyond the paper"
METHODS: dict[str, tuple[str, str]] = {
    "fkl_unaligned": ("forward KL, unaligned proxy, its text", BASELINES),
    "minillm": ("MiniLLM, unaligned proxy", BASELINES),
    "gkd": ("GKD, unaligned proxy", BASELINES),
    "fkl_aligned": ("forward KL, aligned proxy, its text", BASELINES),
    BLACK_BOX: ("black-box KD on D_s (= without proxy)", BASELINES),
    "takd_raw": ("TAKD, raw assistant", BASELINES),
    "takd_finetuned": ("TAKD, fine-tuned assistant", BASELINES),
    "mentor_kd": ("Mentor-KD", BASELINES),
    PROXY_KD: ("Proxy-KD", BASELINES),
    "without_alignment_raw": ("without alignment (raw proxy)", ABLATIONS),
    "without_alignment_warmup": ("without alignment (warmed-up proxy)", ABLATIONS),
    "without_preference": ("without the preference loss", ABLATIONS),
    "without_weights": ("without weights", ABLATIONS),
    BLACK_BOX_ALL: ("black-box KD on all of D", CONTROLS),
    "teacher_logits": ("the teacher's true logits on D_s", CONTROLS),
    "proxy_kd_all": ("Proxy-KD on all of D", BEYOND),
    "proxy_kd_fresh": ("Proxy-KD + fresh prompts", BEYOND),
    "proxy_kd_mix": ("Proxy-KD + half of the steps on own answers", BEYOND),
    "on_policy": ("on-policy reverse KL, aligned proxy", BEYOND),
    "on_policy_mix": ("on-policy and D_s by halves, aligned proxy", BEYOND),
    "random_labels": ("Proxy-KD with drawn soft labels", BEYOND),
    SODA: ("SODA", BEYOND),
    GAD: ("GAD", BEYOND),
}
# These depend on the preset. The others have their own papers' values and serve both presets.
OF_PRESET = (
    PROXY_KD,
    "without_alignment_raw",
    "without_alignment_warmup",
    "without_preference",
    "without_weights",
    "teacher_logits",
    "proxy_kd_all",
    "proxy_kd_fresh",
    "proxy_kd_mix",
    "random_labels",
)
OF_NO_PRESET = tuple(name for name in METHODS if name not in OF_PRESET)
EQUAL = 1.0  # The KL has this weight beside an NLL of weight 1, where the paper gives no alpha.
# The KL of the others is over the whole vocabulary. The top 10 of 46 tokens hold nearly all of it.
OTHERS_TAIL = "renormalize_proxy"


def make_methods(setting: Setting) -> dict[str, Any_Method]:
    """All methods by name, with the preset's alpha and data for those that are Proxy-KD.

    ``paper`` learns from D_s, ``recommended`` from all of D and the fresh prompts.
    """
    alpha = setting.config.distill.alpha
    whole = setting.config.distill.data == "all"

    def proxy_kd(state: str, splits: tuple[str, ...] = (DISTILL,), **source: Any) -> Method:
        sources = tuple(Source(split, labels=state, **source) for split in splits)
        return Method(sources, alpha, weighted=True)

    def with_fresh(method: Method, state: str, **source: Any) -> Method:
        fresh = Source(FRESH, writer=state, labels=state, nll=False, **source)
        return dataclasses.replace(method, sources=(*method.sources, fresh))

    def headline(state: str, **source: Any) -> Method:
        if not whole:
            return proxy_kd(state, **source)
        return with_fresh(proxy_kd(state, ALL, **source), state, **source)

    def others(*sources: Source, alpha: float = EQUAL, temperature: float | None = None) -> Method:
        return Method(sources, alpha, temperature=temperature, tail=OTHERS_TAIL)

    def own_text(state: str) -> Method:
        """Forward KL alone on the proxy's own answers."""
        return others(Source(DISTILL, writer=state, labels=state, nll=False))

    aligned, sft, mentor = px.PREFERENCE, px.NLL, MentorKd()
    half: dict[str, Any] = {"beta": 0.5, "student_share": 0.5}
    return {
        "fkl_unaligned": own_text(px.RAW),
        "minillm": OnPolicyMethod(px.RAW, MiniLlm()),
        "gkd": OnPolicyMethod(px.RAW, Gkd(**half, fixed="scorer")),
        "fkl_aligned": own_text(aligned),
        BLACK_BOX: Method((Source(DISTILL),)),
        "takd_raw": others(Source(DISTILL, labels=px.RAW)),
        "takd_finetuned": others(Source(DISTILL, labels=sft)),
        "mentor_kd": others(
            Source(DISTILL, labels=sft),
            Source(DISTILL, writer=sft, labels=sft),
            alpha=mentor.lam / (1 - mentor.lam),
            temperature=mentor.temperature,
        ),
        PROXY_KD: headline(aligned),
        "without_alignment_raw": headline(px.RAW),
        "without_alignment_warmup": headline(px.WARMUP),
        "without_preference": headline(sft),
        "without_weights": dataclasses.replace(headline(aligned), weighted=False),
        BLACK_BOX_ALL: Method(tuple(Source(split) for split in ALL)),
        "teacher_logits": Method((Source(DISTILL, labels=TRUTH),), alpha),
        "proxy_kd_all": proxy_kd(aligned, ALL),
        "proxy_kd_fresh": with_fresh(proxy_kd(aligned), aligned),
        "proxy_kd_mix": dataclasses.replace(headline(aligned), student_share=0.5),
        "on_policy": OnPolicyMethod(aligned, OnPolicy(samples_per_prompt=1)),
        "on_policy_mix": OnPolicyMethod(aligned, Gkd(**half)),
        "random_labels": headline(aligned, drawn=True),
        SODA: SODA,
        GAD: GAD,
    }


def train(
    material: Material, method: Any_Method, student_S: Any, validation: TokenBatch, **options: Any
) -> Run:
    """Trains the students of all seeds by a method of any kind."""
    if isinstance(method, Method) and method.student_share:
        return mixing.train(material, method, student_S, validation, **options)
    if isinstance(method, Method):
        return offline.train(material, method, student_S, validation, **options)
    if isinstance(method, OnPolicyMethod):
        return on_policy.train(material, method, student_S, validation, **options)
    if method == GAD:
        return adversarial.train(material, student_S, validation, **options)
    return on_policy.train_soda(material, student_S, validation, **options)
