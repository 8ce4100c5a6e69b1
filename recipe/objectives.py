"""What is learnt: modules from a batch to (loss sum, count)."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import RobertaForMaskedLM


def take(values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """(batch, slots, width) of (batch, length, width) at the positions (batch, slots)."""
    return values.gather(1, slots[:, :, None].expand(-1, -1, values.shape[2]))


def encode_at(
    layer: nn.Module, hidden: torch.Tensor, slots: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """What a layer of RoBERTa gives at some positions, which see all.

    Args:
        layer: a `RobertaLayer`.
        hidden: (batch, length, width), its input.
        slots: (batch, slots) int64, the positions.
        attention_mask: None, or boolean and broadcastable to (batch, heads, slots, length).

    Returns:
        (batch, slots, width)
    """
    attention = layer.attention.self
    rows = take(hidden, slots)
    query, key, value = (
        projected.unflatten(2, (-1, attention.attention_head_size)).transpose(1, 2)
        for projected in (attention.query(rows), attention.key(hidden), attention.value(hidden))
    )
    dropout = attention.dropout.p if attention.training else 0.0
    mixed = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=attention.scaling)
    return layer.feed_forward_chunk(layer.attention.output(mixed.transpose(1, 2).flatten(2), rows))


class MaskedLMObjective(nn.Module):
    """Masked language modelling with the last layer and the head at masked positions only.

    A row's masked positions are gathered into `max_masked` slots, so that every shape is static and nothing waits for
    the device; slots that a row does not use are ignored by the loss. At 15 % that leaves out 85 % of the projection
    to the vocabulary, a quarter of all FLOPs of roberta-base, and most of the last layer, whose other outputs nothing
    reads: only its keys and values are needed everywhere.

    The model inside stays a plain `RobertaForMaskedLM`.

    Args:
        model: the model to train.
        max_masked: the most masked tokens that a row can have.
    """

    def __init__(self, model: RobertaForMaskedLM, max_masked: int) -> None:
        super().__init__()
        self.model = model
        self.max_masked = max_masked
        # Accelerate's FSDP wraps the classes named here, and nothing, silently, where the attribute is missing.
        self._no_split_modules = model._no_split_modules

    def tie_weights(self) -> None:
        """Tie the output to the input embeddings again, after an engine replaced the parameters."""
        self.model.tie_weights()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (…, vocabulary) of hidden states (…, width)."""
        return self.model.lm_head(hidden)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the cross-entropy over the masked tokens, in nats.

        Args:
            input_ids, labels, position_ids: (batch, length) int64; labels are -100 where nothing is predicted.
            attention_mask: (batch, length), 0 at padding; None where no row has any.
            document_ids: (batch, length), in its place: which document of its row a position belongs to, 0 at padding;
                positions see those of the same number.

        Returns:
            the sum, float32, and the number of masked tokens, int64; scalars.
        """
        is_masked = labels != -100
        slots = is_masked.to(torch.uint8).topk(self.max_masked, dim=1, sorted=False).indices
        mask = slot_mask = None
        if attention_mask is not None:
            mask = slot_mask = attention_mask.bool()[:, None, None, :]
        elif document_ids is not None:
            mask = (document_ids[:, :, None] == document_ids[:, None, :])[:, None]
            slot_mask = (document_ids.gather(1, slots)[:, :, None] == document_ids[:, None, :])[:, None]
        # Layer by layer: `RobertaModel.forward` would run all of the last one, and would ask the device whether a mask
        # is all ones, and wait for the answer.
        encoder = self.model.roberta
        hidden = encoder.embeddings(input_ids=input_ids, position_ids=position_ids)
        *layers, last = encoder.encoder.layer
        for layer in layers:
            hidden = layer(hidden, mask)
        logits = self.head(encode_at(last, hidden, slots, slot_mask))
        slot_labels = labels.gather(1, slots)
        loss_sum = F.cross_entropy(
            logits.flatten(0, 1).float(), slot_labels.flatten(), ignore_index=-100, reduction="sum"
        )
        return loss_sum, is_masked.sum()


def compile_in_place(objective: nn.Module, device: torch.device) -> list[str]:
    """Have a module's forward compiled when it is first called, for each shape and mode of its own; its parameters keep
    their names.

    Returns:
        a warning if nothing can be compiled for the device, and the module is left as it is.
    """
    try:
        torch.compile(F.gelu)(torch.zeros(8, device=device))
    except Exception as error:  # no compiler, no Triton, a device too old: each raises an error of its own kind
        reason = str(error).strip().splitlines()[0]
        return [f"warning: `torch_compile` is true, and nothing compiles here ({reason}); going on without"]
    objective.compile(fullgraph=True, dynamic=False)
    return []
