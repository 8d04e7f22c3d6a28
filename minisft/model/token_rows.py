"""A frozen embedding or head in which a few rows are trained: those of tokens that are new to the base model.

With adapters the rest of the model is frozen, so a new token's row would keep its initial value, the mean of all others. The
row is D numbers; the matrix is V x D, and training it whole would cost its size again for the gradient and twice for the
moments. In PEFT's files the rows are called `trainable_tokens_delta`, but are the rows themselves and not differences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.model.shards import whole


class TokenRows(nn.Module):
    """Takes the place of an nn.Embedding or of the head; weight [V, D] is the frozen matrix, under its old name. The rows have no
    values until `start`."""

    index: Tensor  # [n], ids
    place: Tensor  # [V], where a token's row is in `rows`; -1: it is not trained

    def __init__(self, base: nn.Embedding | nn.Linear, ids: tuple[int, ...], dtype: torch.dtype):
        super().__init__()
        self.weight, self.bias, self.enabled = base.weight, getattr(base, "bias", None), True
        self.is_head = isinstance(base, nn.Linear)
        self.ids, device = ids, base.weight.device
        self.register_buffer("index", torch.empty(len(ids), dtype=torch.int64, device=device))
        self.register_buffer("place", torch.empty(len(base.weight), dtype=torch.int64, device=device))
        self.rows = nn.Parameter(torch.empty(len(ids), base.weight.shape[1], dtype=dtype, device=device))  # [n, D]

    @torch.no_grad()
    def start(self) -> None:
        """The rows as they are in the matrix."""
        self.index.copy_(torch.tensor(self.ids))
        self.place.fill_(-1)
        self.place[self.index] = torch.arange(len(self.ids), device=self.place.device)
        self.rows.copy_(whole(self.weight)[self.index])

    def forward(self, ids: Tensor) -> Tensor:
        """ids int [T] -> [T, D]"""
        x = F.embedding(ids, self.weight)
        if not self.enabled:
            return x
        place = self.place[ids]
        return torch.where((place >= 0)[:, None], self.rows[place.clamp(min=0)].to(x.dtype), x)

    def whole(self) -> Tensor:
        """[V, D] with the trained rows in their places, for the product of the head."""
        return self.weight.index_copy(0, self.index, self.rows.to(self.weight.dtype)) if self.enabled else self.weight

    def merged(self) -> nn.Embedding | nn.Linear:
        """The module whose place it took, with the trained rows written into its weight, in place."""
        num_tokens, width = self.weight.shape
        with torch.no_grad():
            self.weight[self.index] = self.rows.to(self.weight.dtype)
        if self.is_head:
            module = nn.Linear(width, num_tokens, bias=self.bias is not None, device="meta")
            if self.bias is not None:
                module.bias = self.bias
        else:
            module = nn.Embedding(num_tokens, width, device="meta")
        module.weight = self.weight
        return module
