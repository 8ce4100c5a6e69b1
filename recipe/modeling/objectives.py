"""What is learnt: modules from a batch to sums and counts, one each for masked language modelling alone, with next
sentences and with sentence order.
"""

import math
from functools import partial
from typing import ClassVar

import torch
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def gather_positions(values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """(batch, slots, width) of (batch, length, width) at the positions (batch, slots)."""
    return values.gather(1, slots[:, :, None].expand(-1, -1, values.shape[2]))


class BertAdapter:
    """A BERT in parts, since the whole would run all of the last layer, and would ask the device whether a mask is all
    ones, and wait for the answer.

    Attributes:
        pair_head: modules that the model does not have.
    """

    pair_head: nn.Module | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.base = model.base_model

    def add_pair_head(self) -> None:
        """Make what a pair objective needs and the model does not have."""

    def embed(self, **inputs: torch.Tensor | None) -> torch.Tensor:
        """(batch, length, width), what the first layer takes."""
        return self.base.embeddings(**inputs)

    def layers(self) -> list[nn.Module]:
        return list(self.base.encoder.layer)

    def encode_at(
        self, layer: nn.Module, hidden: torch.Tensor, slots: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """What a layer gives at some positions, which see all.

        Args:
            hidden: (batch, length, width), its input.
            slots: (batch, slots) int64, the positions.
            mask: None, or boolean and broadcastable to (batch, heads, slots, length).

        Returns:
            (batch, slots, width)
        """
        attention, dropout = self.attention(layer)
        rows = gather_positions(hidden, slots)
        query, key, value = (
            projected.unflatten(2, (-1, attention.attention_head_size)).transpose(1, 2)
            for projected in (attention.query(rows), attention.key(hidden), attention.value(hidden))
        )
        share = dropout.p if dropout.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, mask, share, scale=attention.scaling)
        return self.finish(layer, mixed.transpose(1, 2).flatten(2), rows)

    def attention(self, layer: nn.Module) -> tuple[nn.Module, nn.Dropout]:
        """The module with a layer's projections, and the dropout of its attention."""
        return layer.attention.self, layer.attention.self.dropout

    def finish(self, layer: nn.Module, mixed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The rest of a layer: (batch, slots, width) of what its attention gave and of its input."""
        return layer.feed_forward_chunk(layer.attention.output(mixed, rows))

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (…, vocabulary) of hidden states (…, width)."""
        return self.model.cls.predictions(hidden)

    def pair_logits(self, first: torch.Tensor) -> torch.Tensor:
        """(batch, 2) of the hidden states (batch, width) of the first position."""
        return self.model.cls.seq_relationship(self.base.pooler(first[:, None]))


class RobertaAdapter(BertAdapter):
    """A RoBERTa, which has no pair head: BERT's is put beside it, and stays outside of the model that is saved."""

    def add_pair_head(self) -> None:
        width = self.model.config.hidden_size
        self.pair_head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))
        self.pair_head.apply(self.model._init_weights)

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(hidden)

    def pair_logits(self, first: torch.Tensor) -> torch.Tensor:
        return self.pair_head(first)


class AlbertAdapter(BertAdapter):
    """An ALBERT: one layer many times, or a few groups of them."""

    def embed(self, **inputs: torch.Tensor | None) -> torch.Tensor:
        return self.base.encoder.embedding_hidden_mapping_in(super().embed(**inputs))

    def layers(self) -> list[nn.Module]:
        config, groups = self.model.config, self.base.encoder.albert_layer_groups
        per_group = config.num_hidden_layers / config.num_hidden_groups
        return [layer for n in range(config.num_hidden_layers) for layer in groups[int(n / per_group)].albert_layers]

    def attention(self, layer: nn.Module) -> tuple[nn.Module, nn.Dropout]:
        return layer.attention, layer.attention.attention_dropout

    def finish(self, layer: nn.Module, mixed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        attention = layer.attention
        attended = attention.LayerNorm(rows + attention.output_dropout(attention.dense(mixed)))
        return layer.full_layer_layer_norm(layer.ff_chunk(attended) + attended)

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.predictions(hidden)

    def pair_logits(self, first: torch.Tensor) -> torch.Tensor:
        return self.model.sop_classifier(self.base.pooler_activation(self.base.pooler(first)))


ADAPTERS = {"roberta": RobertaAdapter, "bert": BertAdapter, "albert": AlbertAdapter}


class MaskedLMObjective(nn.Module):
    """Masked language modelling with the last layer and the head at masked positions only.

    A row's masked positions are gathered into as many slots as there can be, so that every shape is static and nothing
    waits for the device; slots that a row does not use are ignored by the loss. At 15 % that leaves out 85 % of the
    projection to the vocabulary, a quarter of all FLOPs of roberta-base, and most of the last layer, whose other
    outputs nothing reads: only its keys and values are needed everywhere.

    The model inside stays a plain model of transformers.

    Args:
        model: the model to train.
        masked_share: of a row's positions, the most that can be masked.
        gradient_checkpointing: keep only each layer's input for the backward pass.

    Attributes:
        measures: what a forward pass measures, and what of an update each is the mean over (`masked` tokens, `pairs`).
            What is minimised is the sum of these means; an accuracy has no gradient.
        leading_slots: positions that are read beside the masked ones.
    """

    measures: ClassVar[dict[str, str]] = {"loss": "masked"}
    leading_slots = 0

    def __init__(self, model: PreTrainedModel, masked_share: float, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
        self.masked_share = masked_share
        self.gradient_checkpointing = gradient_checkpointing
        self.adapter = ADAPTERS[model.config.model_type](model)
        # Accelerate's FSDP wraps the classes named here, and nothing, silently, where the attribute is missing, as
        # it is in ALBERT. Layers alone: embeddings, which BERT and RoBERTa name too, share a weight with the head.
        self._no_split_modules = sorted({type(layer).__name__ for layer in self.adapter.layers()})
        # On the layer, as its other way to run, since that is what FSDP can be told about.
        *_, last = self.adapter.layers()
        last.encode_at = partial(self.adapter.encode_at, last)

    def tie_weights(self) -> None:
        """Tie the output to the input embeddings again, after an engine replaced the parameters."""
        self.model.tie_weights()

    def serve_fsdp(self) -> None:
        """Have FSDP, where it has wrapped the last layer, gather its weights for `encode_at` too."""
        *_, last = self.adapter.layers()
        register_fsdp_forward_method(last, "encode_at")

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (…, vocabulary) of hidden states (…, width)."""
        return self.adapter.lm_head(hidden)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        pair_label: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is measured on a batch.

        Args:
            input_ids, labels, position_ids: (batch, length) int64; labels are -100 where nothing is predicted.
            attention_mask: (batch, length), 0 at padding; None where no row has any.
            document_ids: (batch, length), in its place: which document of its row a position belongs to, 0 at padding;
                positions see those of the same number.
            token_type_ids: (batch, length), the part of a pair; of no use to a model with a single type, as RoBERTa is.
            pair_label: (batch,), which of two kinds a pair is, -100 for no pair; of no use to masked LM alone.

        Returns:
            of each of `measures` the sum, float32, and what it is to be divided by, int64: (measures,).
        """
        num_slots = math.ceil(self.masked_share * labels.shape[1])
        slots = (labels != -100).to(torch.uint8).topk(num_slots, dim=1, sorted=False).indices
        slot_labels = labels.gather(1, slots)
        slots = F.pad(slots, (self.leading_slots, 0))
        if self.model.config.type_vocab_size == 1:
            token_type_ids = None
        hidden = self.adapter.embed(input_ids=input_ids, position_ids=position_ids, token_type_ids=token_type_ids)
        mask = slot_mask = None
        if attention_mask is not None:
            mask = slot_mask = attention_mask.bool()[:, None, None, :]
        elif document_ids is not None:
            mask = (document_ids[:, :, None] == document_ids[:, None, :])[:, None]
            slot_mask = (document_ids.gather(1, slots)[:, :, None] == document_ids[:, None, :])[:, None]
        *layers, last = self.adapter.layers()
        for layer in layers:
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(layer, hidden, mask, use_reentrant=False)
            else:
                hidden = layer(hidden, mask)
        return self.measure(last.encode_at(hidden, slots, slot_mask), slot_labels, pair_label)

    def measure(
        self, hidden: torch.Tensor, labels: torch.Tensor, pair_label: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden: (batch, leading_slots + slots, width), of the last layer.
            labels: (batch, slots)
        """
        loss_sum, count = self.measure_masked_lm(hidden, labels)
        return loss_sum[None], count[None]

    def measure_masked_lm(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the cross-entropy over the masked tokens, in nats, and their number; scalars."""
        logits = self.head(hidden).flatten(0, 1).float()
        loss_sum = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
        return loss_sum, (labels != -100).sum()


class PairObjective(MaskedLMObjective):
    """Masked language modelling, and telling two kinds of pairs apart by the first position (BERT, section 3.1). What
    the kinds are is decided by packing.
    """

    leading_slots = 1  # the first position

    def __init__(self, model: PreTrainedModel, masked_share: float, gradient_checkpointing: bool = False) -> None:
        super().__init__(model, masked_share, gradient_checkpointing)
        self.adapter.add_pair_head()
        self.pair_head = self.adapter.pair_head

    def measure(
        self, hidden: torch.Tensor, labels: torch.Tensor, pair_label: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss_sum, masked = self.measure_masked_lm(hidden[:, 1:], labels)
        logits = self.adapter.pair_logits(hidden[:, 0]).float()
        pair_loss = F.cross_entropy(logits, pair_label, ignore_index=-100, reduction="sum")
        right, pairs = (logits.argmax(1) == pair_label).sum(), (pair_label != -100).sum()
        return torch.stack([loss_sum, pair_loss, right.float()]), torch.stack([masked, pairs, pairs])


class NextSentenceObjective(PairObjective):
    """The second part follows the first (0), or is from another document (1)."""

    measures: ClassVar[dict[str, str]] = {
        "loss": "masked",
        "next_sentence_loss": "pairs",
        "next_sentence_accuracy": "pairs",
    }


class SentenceOrderObjective(PairObjective):
    """The parts are in their order (0), or swapped (1) (ALBERT, section 3.1)."""

    measures: ClassVar[dict[str, str]] = {
        "loss": "masked",
        "sentence_order_loss": "pairs",
        "sentence_order_accuracy": "pairs",
    }


OBJECTIVES = {
    "masked_lm": MaskedLMObjective,
    "next_sentence": NextSentenceObjective,
    "sentence_order": SentenceOrderObjective,
}


def why_nothing_compiles(device: torch.device) -> str | None:
    """The reason why `torch.compile` does not work for the device, or None, found by trying."""
    try:
        torch.compile(F.gelu)(torch.zeros(8, device=device))
    except Exception as error:  # no compiler, no Triton, a device too old: each raises an error of its own kind
        return str(error).strip().splitlines()[0]
    return None


def compile_in_place(objective: nn.Module, device: torch.device, in_one: bool = True) -> list[str]:
    """Have a module's forward compiled when it is first called, for each shape and mode of its own; its parameters keep
    their names.

    Args:
        in_one: as one graph; in several where something has to happen in between, as FSDP's gathering of weights.

    Returns:
        a warning if nothing can be compiled for the device, and the module is left as it is.
    """
    if reason := why_nothing_compiles(device):
        return [f"warning: `torch_compile` is true, and nothing compiles here ({reason}); going on without"]
    objective.compile(fullgraph=in_one, dynamic=False)
    return []
