"""The objective with each of its levers off, or with one more: what `throughput.py --ladder` compares.

All of them learn the same as `MaskedLMObjective` from the same batch, but for what each says of itself.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipe.modeling.adapters import LayerParts
from recipe.modeling.attention import Sequences, check_kernel
from recipe.modeling.objectives import MaskedLMObjective, Places, States, take


class LastLayerEverywhere(MaskedLMObjective):
    """The objective with the head at masked positions, and all of the last layer."""

    def run_layer(
        self, layer: Any, states: States, where: Any, seeds: Tensor | None, slots: Tensor | None = None
    ) -> States:
        if isinstance(where, Sequences):
            where = where._replace(query_bounds=where.key_bounds)
        hidden, residual = super().run_layer(layer, states, where, seeds)
        return States(take(hidden, slots), None if residual is None else take(residual, slots))


class HeadEverywhere(MaskedLMObjective):
    """The objective without its gathers: all of the last layer, and the head at every position."""

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, **places: Tensor):
        if "slots" in places:
            labels = torch.full_like(input_ids, -100).scatter(0, places["slots"], labels)
            places["slots"] = torch.arange(len(input_ids), device=input_ids.device)
            places["query_bounds"] = places["key_bounds"]
        return super().forward(input_ids, labels, position_ids, **places)

    def places_in_rows(self, labels: Tensor, attention_mask: Tensor | None = None) -> Places:
        every = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
        return super().places_in_rows(labels, attention_mask)._replace(slots=every, labels=labels)


class OneProduct(MaskedLMObjective):
    """The objective of a post-norm model with a layer's queries, keys and values by one product, of weights put
    together in each step, so that the model stays plain.
    """

    def __init__(self, model: nn.Module, masked_share: float, gradient_checkpointing: bool = False) -> None:
        super().__init__(model, masked_share, gradient_checkpointing)
        parts = self.adapter.parts
        self.adapter.parts = lambda layer: layer if isinstance(layer, LayerParts) else parts(layer)

    def run_layer(
        self, layer: Any, states: States, where: Any, seeds: Tensor | None, slots: Tensor | None = None
    ) -> States:
        parts = self.adapter.parts(layer)
        if slots is None:
            projections = parts.query, parts.key, parts.value
            weight = torch.cat([projection.weight for projection in projections])
            bias = torch.cat([projection.bias for projection in projections])
            query, key, value = F.linear(states.hidden, weight, bias).chunk(3, -1)
            parts = parts._replace(query=lambda _: query, key=lambda _: key, value=lambda _: value)
        return super().run_layer(parts, states, where, seeds, slots)


class ResidualInBf16(MaskedLMObjective):
    """The objective of plain modules with layers that hand on bf16, as the fused kernel has them do on a GPU."""

    def __init__(self, model: nn.Module, masked_share: float, gradient_checkpointing: bool = False) -> None:
        super().__init__(model, masked_share, gradient_checkpointing)
        for module in model.base_model.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_hook(lambda norm, inputs, output: output.bfloat16())


# What follows changes an objective that has its kernels and is not compiled yet.


def pad_rows(objective: MaskedLMObjective) -> None:
    """Compute rows with their padding, under a mask."""
    if not objective.unpadding:
        raise RuntimeError("no kernel attends within sequences, and rows are padded anyway")
    objective.unpadding = None


def unfuse(objective: MaskedLMObjective) -> None:
    """Run dropout, residual and layer norm as plain modules, which give float32."""
    if not objective.residual_dtype:
        raise RuntimeError("no kernel has dropout, residual and layer norm in one, and they run apart anyway")
    objective.residual_dtype = None


def keep_float32(objective: MaskedLMObjective) -> None:
    """Have layers hand on float32 by the fused kernel."""
    if objective.residual_dtype != torch.bfloat16:
        raise RuntimeError("layers hand on float32 anyway")
    objective.residual_dtype = torch.float32


def attend_by(kernel: str):
    """Make a lever that has one kernel attend within sequences."""

    def change(objective: MaskedLMObjective) -> None:
        if not objective.unpadding:
            raise RuntimeError("no kernel attends within sequences")
        config, device = objective.model.config, torch.device("cuda")
        size = 1, config.num_attention_heads, config.hidden_size // config.num_attention_heads
        check_kernel(kernel, torch.empty(size, dtype=torch.bfloat16, device=device))
        objective.unpadding = replace(objective.unpadding, kernel=kernel)

    return change
