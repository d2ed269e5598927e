"""Class labels: a class is a caption of one learnt token, so every backbone of captions takes it.

The class behind the last is the null class, for classifier-free guidance (Ho & Salimans 2022).
"""

import torch
from torch import Tensor, nn

from ldm_core.conditioning.text import TextCondition


class ClassEmbedding(nn.Module):
    """labels (B,) -> TextCondition of B captions, one token each."""

    def __init__(self, classes: int, text_width: int, pooled_width: int) -> None:
        super().__init__()
        self.classes = classes
        self.tokens = nn.Embedding(classes + 1, text_width)
        self.pooled = nn.Embedding(classes + 1, pooled_width)

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> TextCondition:
        """Look the labels up.

        Args:
            labels: (B,) int64 in [0, classes).
            drop: (B,) bool, True where the null class takes the label's place.

        Raises:
            ValueError: a label out of range.
        """
        outside = (labels < 0) | (labels >= self.classes)
        if bool(outside.any()):
            raise ValueError(f"label {int(labels[outside][0])} of {self.classes} classes")
        return self._embed(labels if drop is None else labels.masked_fill(drop, self.classes))

    def null(self) -> TextCondition:
        """The null class, a batch of one."""
        return self._embed(torch.tensor([self.classes], device=self.tokens.weight.device))

    def _embed(self, labels: Tensor) -> TextCondition:
        tokens = self.tokens(labels)[:, None]  # (B, 1, D)
        mask = torch.ones(len(labels), 1, dtype=torch.bool, device=labels.device)
        return TextCondition(tokens, mask, self.pooled(labels))
