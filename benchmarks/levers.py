"""The objective with each of its levers off, or with one more: what `throughput.py --ladder` compares.

All of them learn the same as `MaskedLMObjective` from the same batch, but for what each says of itself.
"""

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from recipe.modeling.objectives import MaskedLMObjective


class HeadEverywhere(nn.Module):
    """The objective without its gathers: all of the last layer, and the head at every position."""

    def __init__(self, model: nn.Module, masked_share: float, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        hidden = self.model.roberta(input_ids, attention_mask=mask, position_ids=position_ids).last_hidden_state
        logits = self.model.lm_head(self.select(hidden, labels))
        return self.loss(logits, labels)

    def select(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return hidden

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = logits.flatten(0, 1).float()
        return F.cross_entropy(flat, labels.flatten(), reduction="sum")[None], (labels != -100).sum()[None]


class LastLayerEverywhere(HeadEverywhere):
    """The objective with the head at masked positions, and all of the last layer."""

    def __init__(self, model: nn.Module, masked_share: float, gradient_checkpointing: bool) -> None:
        super().__init__(model, masked_share, gradient_checkpointing)
        self.masked_share = masked_share

    def select(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        num_slots = math.ceil(self.masked_share * labels.shape[1])
        self.slots = (labels != -100).to(torch.uint8).topk(num_slots, dim=1, sorted=False).indices
        return hidden.gather(1, self.slots[:, :, None].expand(-1, -1, hidden.shape[2]))

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().loss(logits, labels.gather(1, self.slots))


class PaddedVocabulary(MaskedLMObjective):
    """The objective with the vocabulary padded to a multiple of 64 for each product; a bias of -inf is never likely."""

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        lm_head = self.model.lm_head
        hidden = lm_head.layer_norm(F.gelu(lm_head.dense(hidden)))
        missing = -lm_head.decoder.out_features % 64
        weight = F.pad(lm_head.decoder.weight, (0, 0, 0, missing))
        bias = F.pad(lm_head.decoder.bias, (0, missing), value=-torch.inf)
        return F.linear(hidden, weight, bias)


class Unmasked(MaskedLMObjective):
    """The objective as if no row had padding. What would fill the tails makes no difference to the time; without it,
    positions see padding.
    """

    def forward(
        self, attention_mask: torch.Tensor | None = None, **batch: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(**batch)


class ResidualInBf16(MaskedLMObjective):
    """The objective with layers that hand on bf16, where autocast has layer norms give float32. It rounds more."""

    def __init__(self, model: nn.Module, masked_share: float, gradient_checkpointing: bool = False) -> None:
        super().__init__(model, masked_share, gradient_checkpointing)
        for module in model.base_model.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_hook(lambda norm, inputs, output: output.bfloat16())


class OneProduct(MaskedLMObjective):
    """The objective with a layer's queries, keys and values by one product, of weights put together in each step, so
    that the model stays plain.
    """

    def __init__(self, model: nn.Module, masked_share: float, gradient_checkpointing: bool = False) -> None:
        super().__init__(model, masked_share, gradient_checkpointing)
        for layer in self.adapter.layers()[:-1]:
            layer.attention.self.forward = partial(attend_by_one_product, layer.attention.self)


def attend_by_one_product(
    attention: nn.Module, hidden: torch.Tensor, attention_mask: torch.Tensor | None, **_: object
) -> tuple[torch.Tensor, None]:
    """In place of the forward of a self-attention of RoBERTa."""
    projections = (attention.query, attention.key, attention.value)
    weight = torch.cat([projection.weight for projection in projections])
    bias = torch.cat([projection.bias for projection in projections])
    heads = F.linear(hidden, weight, bias).unflatten(2, (3, -1, attention.attention_head_size))
    query, key, value = heads.permute(2, 0, 3, 1, 4)
    share = attention.dropout.p if attention.training else 0.0
    mixed = F.scaled_dot_product_attention(query, key, value, attention_mask, share, scale=attention.scaling)
    return mixed.transpose(1, 2).flatten(2), None
