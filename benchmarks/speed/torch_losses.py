"""The losses of TRL's trainers, as functions of a model and a batch.

Most works have two ways. ``fused`` asks the head that TRL puts on a model (``add_fused_lm_head``)
for log-probs of the labels. ``logits`` takes whole logits, as transformers' own loss and TRL's
earlier trainers do. Both project every position: without Triton, TRL's head does so too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

BETA = 0.1
ALPHA = 1.0

Batch = dict[str, torch.Tensor]


def _inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _fused_logps(model: Any, batch: Batch) -> torch.Tensor:
    """The log-probs of the labels after the first; 0 where there is no label."""
    found = model(**_inputs(batch), labels=batch["labels"], use_cache=False, fused_lm_head=True)
    return found.log_probs


def _logits_logps(model: Any, batch: Batch) -> torch.Tensor:
    """The same log-probs by TRL's ``selective_log_softmax`` of whole logits."""
    from trl.trainer.utils import selective_log_softmax

    logits = model(**_inputs(batch), use_cache=False).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    logps = selective_log_softmax(logits, labels.clamp(min=0))
    return logps.masked_fill(labels == -100, 0.0)


def sft_fused(model: Any, batch: Batch) -> torch.Tensor:
    """The loss ``nll`` of ``SFTTrainer``."""
    return -_fused_logps(model, batch).sum() / (batch["labels"][:, 1:] != -100).sum()


def sft_logits(model: Any, batch: Batch) -> torch.Tensor:
    """The loss of transformers' own model."""
    return model(**_inputs(batch), labels=batch["labels"], use_cache=False).loss


def _dpo(logps: torch.Tensor, batch: Batch, nll: bool) -> torch.Tensor:
    """The losses ``sigmoid`` and, with ``nll``, ``sft`` of ``DPOTrainer``, on stored references."""
    chosen_B, rejected_B = logps.sum(dim=1).chunk(2, dim=0)
    chosen_scores = chosen_B - batch["reference_chosen"]
    rejected_scores = rejected_B - batch["reference_rejected"]
    loss = -F.logsigmoid(BETA * (chosen_scores - rejected_scores)).mean()
    if nll:
        chosen_labels = batch["labels"][:, 1:].chunk(2, dim=0)[0]
        loss = loss - logps.chunk(2, dim=0)[0].sum() / (chosen_labels != -100).sum()
    return loss


def dpo_fused(model: Any, batch: Batch) -> torch.Tensor:
    """Both losses, from the fused head."""
    return _dpo(_fused_logps(model, batch), batch, nll=True)


def dpo_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Both losses, from whole logits."""
    return _dpo(_logits_logps(model, batch), batch, nll=True)


def dpo_plain_fused(model: Any, batch: Batch) -> torch.Tensor:
    """The preference alone, from the fused head."""
    return _dpo(_fused_logps(model, batch), batch, nll=False)


def _distill(topk: torch.Tensor, gold: torch.Tensor, batch: Batch, first: int) -> torch.Tensor:
    """The forward KL of ``ServerDistillationTrainer`` on stored log-probs and the tail's bucket.

    The NLL of the answers and the weights of the examples are added; TRL has neither.
    """
    from trl.experimental.server_distillation.server_distillation_trainer import (
        _add_tail_bucket,
        _jsd_divergence,
    )

    mask = batch["labels"][:, first:] != -100
    teacher = batch["topk_logps"][:, first:]
    valid = torch.ones_like(teacher, dtype=torch.bool)
    student, support = _add_tail_bucket(topk, valid)
    stored, _ = _add_tail_bucket(teacher, valid)
    kl = _jsd_divergence(student, stored, beta=0.0, support_mask=support).sum(dim=-1)
    tokens = mask.sum()
    weighted = (kl * mask * batch["weights"][:, None]).sum() / tokens
    return ALPHA * weighted - (gold * mask).sum() / tokens


def _answer_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
    """Whole logits from before the first answer token of any row, and that token's position."""
    first = max(int((batch["labels"] != -100).int().argmax(dim=1).min()), 1)
    logits = model(**_inputs(batch), use_cache=False).logits
    return logits[:, first - 1 : -1].float(), first


def distill_log_softmax(model: Any, batch: Batch) -> torch.Tensor:
    """Takes the log-softmax of all logits and some of its entries, as the trainer does."""
    logits, first = _answer_logits(model, batch)
    logps = F.log_softmax(logits, dim=-1)
    gold = logps.gather(-1, batch["labels"][:, first:, None].clamp(min=0))[..., 0]
    return _distill(logps.gather(-1, batch["topk_ids"][:, first:]), gold, batch, first)


def distill_selective(model: Any, batch: Batch) -> torch.Tensor:
    """Takes ``selective_log_softmax``, which makes no second array of the vocabulary's size."""
    from trl.trainer.utils import selective_log_softmax

    logits, first = _answer_logits(model, batch)
    labels = batch["labels"][:, first:, None].clamp(min=0)
    ids = torch.cat([batch["topk_ids"][:, first:], labels], dim=-1)
    logps = selective_log_softmax(logits, ids)
    return _distill(logps[..., :-1], logps[..., -1], batch, first)


LOSSES = {
    "sft": {"fused": sft_fused, "logits": sft_logits},
    "dpo": {"fused": dpo_fused, "logits": dpo_logits},
    "dpo_plain": {"fused": dpo_plain_fused},
    "distill": {"selective": distill_selective, "log_softmax": distill_log_softmax},
}
