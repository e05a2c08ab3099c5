"""The oracle: each loss as its formula on the full matrix of one process. Slow, plain, and trusted.

`positive` (B, B) marks the pairs that belong together, `counted` (B, B) those that enter the loss.
"""

import torch
import torch.nn.functional as F


def pair_labels(caption_ids: torch.Tensor, duplicates: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (positive, counted), both bool (B, B), for caption ids (B,) int64.

    Identical captions are negatives, are left out, or are positives, as `duplicates` says.
    """
    own = torch.eye(len(caption_ids), dtype=torch.bool, device=caption_ids.device)
    same = caption_ids[:, None] == caption_ids[None, :]
    positive = own | same if duplicates == "positive" else own
    counted = own | ~same if duplicates == "ignore" else torch.ones_like(own)
    return positive, counted


def sigmoid_loss(image, text, logit_scale, logit_bias, positive, counted):
    """−Σ log σ(±z) / B with z = scale · I·Tᵀ + bias over all counted pairs (SigLIP, equation 1)."""
    logits = logit_scale * image @ text.T + logit_bias
    sign = positive.to(logits.dtype) * 2 - 1
    return -(F.logsigmoid(sign * logits) * counted).sum() / len(image)


def softmax_loss(image, text, logit_scale, positive, counted):
    """Mean of row- and column-wise cross entropy, the target uniform over positives (CLIP, figure 3; UniCL).

    Of several texts of an image, (B, K·B) `positive`, the columns are all texts.
    """
    logits = (logit_scale * image @ text.T).masked_fill(~counted, -torch.inf)
    target = positive.to(logits.dtype)
    rows = (logits.masked_fill(~positive, 0) * target).sum(1) / target.sum(1) - logits.logsumexp(1)
    columns = (logits.masked_fill(~positive, 0) * target).sum(0) / target.sum(0) - logits.logsumexp(0)
    return -(rows.mean() + columns.mean()) / 2


def softmax_loss_with_negatives(image, text, negatives, logit_scale):
    """`softmax_loss` of B pairs, with negatives (N, E) in the images' denominators and not in the texts' (NegCLIP)."""
    logits, own = logit_scale * image @ torch.cat([text, negatives]).T, torch.arange(len(image))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, : len(image)].T, own)) / 2


def view_loss(first, second, temperature):
    """Mean cross entropy of each of 2B views: its other view among all views but itself (SimCLR, equation 1)."""
    views = torch.cat([first, second])
    logits = (views @ views.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(views)).roll(len(first)))


def prototype_loss(student, teacher, center, student_temperature, teacher_temperature):
    """Mean cross entropy of softmax((teacher − center) / T_t) and softmax(student / T_s), rows (n, K) (DINO)."""
    target = ((teacher - center) / teacher_temperature).softmax(1)
    return -(target * (student / student_temperature).log_softmax(1)).sum(1).mean()


def sinkhorn(logits, temperature, rounds):
    """Rows of probabilities (n, K) whose columns sum to nearly n / K: rows and columns normalised in turn (SwAV)."""
    q = (logits / temperature).exp()
    for _ in range(rounds):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / len(q)
    return q * len(q)


def affinity_loss(image, text, logit_scale, teachers):
    """Mean over teachers (image, text, scale) of KL(teacher || student), half of rows and of columns (MobileCLIP)."""

    def distributions(image, text, scale):
        logits = scale * image @ text.T
        return logits.log_softmax(1), logits.T.log_softmax(1)

    own, total = distributions(image, text, logit_scale), 0
    for teacher in teachers:
        for student_log, teacher_log in zip(own, distributions(*teacher), strict=True):
            total += F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) / 2
    return total / len(teachers)


def caption_loss(logits, ids, eos_id):
    """Mean over captions of the mean of −log softmax(z)[id] over their tokens, the first end included (CapPa).

    logits (B, L, V), ids (B, L); a caption without an end counts whole.
    """
    lengths = [row.index(eos_id) + 1 if eos_id in row else len(row) for row in ids.tolist()]
    each = zip(logits, ids, lengths, strict=True)
    return torch.stack([F.cross_entropy(z[:length], row[:length]) for z, row, length in each]).mean()
