"""The objectives: masked language modelling alone, with next sentence prediction, or with sentence order prediction.

Each is a module that turns a batch into sums of losses and the counts to divide them by.
"""

import math
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

Part = Any  # a module of transformers, whose own modules have names that differ from architecture to architecture


class BertAdapter:
    """Access to the parts of a BERT, so that its last layer can run at some positions only.

    The model's own forward would run all of the last layer, and would ask the device whether a mask is all ones, and
    wait for the answer.
    """

    pair_head: Part = None  # what a pair objective needs and the model does not have

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Part = model
        self.base: Part = model.base_model

    def add_pair_head(self) -> None:
        """Make `pair_head`, where the model needs one."""

    def embed(self, **inputs: torch.Tensor | None) -> torch.Tensor:
        """Return the input of the first layer: (batch, length, width)."""
        return self.base.embeddings(**inputs)

    def layers(self) -> list[Part]:
        """List the layers in the order in which they run."""
        return list(self.base.encoder.layer)

    def encode_at(
        self, layer: Part, hidden: torch.Tensor, slots: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Run a layer at some positions, which attend to all of them: (batch, slots, width).

        Args:
            layer: one of `layers()`.
            hidden: (batch, length, width), its input.
            slots: (batch, slots) int64, the positions.
            mask: None, or boolean and broadcastable to (batch, heads, slots, length).
        """
        attention, dropout = self.attention(layer)
        rows = hidden.gather(1, slots[:, :, None].expand(-1, -1, hidden.shape[2]))
        query, key, value = (
            projected.unflatten(2, (-1, attention.attention_head_size)).transpose(1, 2)
            for projected in (attention.query(rows), attention.key(hidden), attention.value(hidden))
        )
        share = dropout.p if dropout.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, mask, share, scale=attention.scaling)
        return self.finish(layer, mixed.transpose(1, 2).flatten(2), rows)

    def attention(self, layer: Part) -> tuple[Part, nn.Dropout]:
        """Return the module with a layer's projections, and the dropout of its attention."""
        return layer.attention.self, layer.attention.self.dropout

    def finish(self, layer: Part, mixed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Run the rest of a layer on what its attention gave and on its input, both (batch, slots, width)."""
        return layer.feed_forward_chunk(layer.attention.output(mixed, rows))

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Turn hidden states (…, width) into logits (…, vocabulary)."""
        return self.model.cls.predictions(hidden)

    def pair_logits(self, first: torch.Tensor) -> torch.Tensor:
        """Turn hidden states (batch, width) of the first position into logits (batch, 2)."""
        return self.model.cls.seq_relationship(self.base.pooler(first[:, None]))


class RobertaAdapter(BertAdapter):
    """Access to the parts of a RoBERTa; BERT's pair head is put beside it, outside of the model that is saved."""

    def add_pair_head(self) -> None:
        """Make a pooler and a pair head like BERT's, with weights drawn as the model's are."""
        width = self.model.config.hidden_size
        self.pair_head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))
        self.pair_head.apply(self.model._init_weights)

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the head, which RoBERTa keeps apart from its pooler: (…, width) to (…, vocabulary)."""
        return self.model.lm_head(hidden)

    def pair_logits(self, first: torch.Tensor) -> torch.Tensor:
        """Run the pooler and pair head beside the model: (batch, width) to (batch, 2)."""
        return self.pair_head(first)


class AlbertAdapter(BertAdapter):
    """Access to the parts of an ALBERT, which runs one layer many times, or the layers of a few groups."""

    def embed(self, **inputs: torch.Tensor | None) -> torch.Tensor:
        """Return the embeddings, widened to what a layer takes: (batch, length, width)."""
        return self.base.encoder.embedding_hidden_mapping_in(super().embed(**inputs))

    def layers(self) -> list[Part]:
        """List the layers of the groups in the order in which they run, each as often as it runs."""
        config, groups = self.model.config, self.base.encoder.albert_layer_groups
        per_group = config.num_hidden_layers / config.num_hidden_groups
        return [layer for n in range(config.num_hidden_layers) for layer in groups[int(n / per_group)].albert_layers]

    def attention(self, layer: Part) -> tuple[Part, nn.Dropout]:
        """Return a layer's attention, which has projections and output in one module, and its dropout."""
        return layer.attention, layer.attention.attention_dropout

    def finish(self, layer: Part, mixed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Run the output of the attention and the rest of the layer: (batch, slots, width)."""
        attention = layer.attention
        attended = attention.LayerNorm(rows + attention.output_dropout(attention.dense(mixed)))
        return layer.full_layer_layer_norm(layer.ff_chunk(attended) + attended)

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the head, which narrows to the width of the embeddings first: (…, width) to (…, vocabulary)."""
        return self.model.predictions(hidden)

    def pair_logits(self, first: torch.Tensor) -> torch.Tensor:
        """Run the pooler and the head for sentence order: (batch, width) to (batch, 2)."""
        return self.model.sop_classifier(self.base.pooler_activation(self.base.pooler(first)))


ADAPTERS = {"roberta": RobertaAdapter, "bert": BertAdapter, "albert": AlbertAdapter}


class MaskedLMObjective(nn.Module):
    """Masked language modelling with the last layer and the head at masked positions only.

    A row's masked positions are gathered into as many slots as there can be, so that every shape is static and nothing
    waits for the device; the loss ignores slots that a row does not use. At 15 % that saves 85 % of the projection to
    the vocabulary, a quarter of all FLOPs of roberta-base, and most of the last layer, whose other outputs nothing
    reads: only its keys and values are needed everywhere.

    The model stays a plain one of transformers; at most `masked_share` of a row's positions are masked.
    """

    # What a forward pass measures, and over what in an update each is averaged: `masked` tokens or `pairs`. The sum of
    # these means is minimised; an accuracy has no gradient.
    measures: ClassVar[dict[str, str]] = {"loss": "masked"}
    leading_slots = 0  # positions that are read beside the masked ones

    def __init__(self, model: PreTrainedModel, masked_share: float, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
        self.masked_share = masked_share
        self.gradient_checkpointing = gradient_checkpointing
        self.adapter = ADAPTERS[model.config.model_type](model)
        # Accelerate's FSDP wraps the classes named here, and nothing, silently, where the attribute is missing, as
        # it is in ALBERT. Layers alone: embeddings, which BERT and RoBERTa name too, share a weight with the head.
        self._no_split_modules = sorted({type(layer).__name__ for layer in self.adapter.layers()})
        # A method of the layer, since FSDP gathers a layer's weights for methods that are registered with it.
        last = self.adapter.layers()[-1]
        last.encode_at = partial(self.adapter.encode_at, last)

    def tie_weights(self) -> None:
        """Tie the output to the input embeddings again, after an engine replaced the parameters."""
        self.model.tie_weights()

    def arrange(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Turn a collated batch, on the CPU, into what `forward` takes."""
        return batch

    def serve_fsdp(self) -> None:
        """Have FSDP, where it has wrapped the last layer, gather its weights for `encode_at` too."""
        register_fsdp_forward_method(self.adapter.layers()[-1], "encode_at")

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
        """Measure the objective on a batch.

        Args:
            input_ids: (batch, length) int64.
            labels: (batch, length) int64, -100 where nothing is predicted.
            position_ids: (batch, length) int64.
            attention_mask: (batch, length), 0 at padding; None where no row has any.
            document_ids: (batch, length), in place of a mask: which document of its row a position belongs to, 0 at
                padding. Positions attend to those of their own document.
            token_type_ids: (batch, length), the part of a pair; unused by a model with a single type, as RoBERTa is.
            pair_label: (batch,), which of two kinds a pair is, -100 for no pair; unused by masked LM alone.

        Returns:
            The sum of each of `measures`, float32, and the count to divide it by, int64: (measures,) each.
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
        """Measure the objective on hidden states (batch, leading_slots + slots, width) and labels (batch, slots)."""
        logits = self.adapter.lm_head(hidden).flatten(0, 1).float()
        loss_sum = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
        return loss_sum[None], (labels != -100).sum()[None]


class PairObjective(MaskedLMObjective):
    """Masked language modelling, and telling two kinds of pairs apart by the first position (BERT, section 3.1)."""

    leading_slots = 1  # the first position

    def __init__(self, model: PreTrainedModel, masked_share: float, gradient_checkpointing: bool = False) -> None:
        super().__init__(model, masked_share, gradient_checkpointing)
        self.adapter.add_pair_head()
        self.pair_head = self.adapter.pair_head

    def measure(
        self, hidden: torch.Tensor, labels: torch.Tensor, pair_label: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Measure both losses and how many pairs are told right; the first hidden state is the first position's."""
        assert pair_label is not None
        sums, counts = super().measure(hidden[:, 1:], labels, None)
        logits = self.adapter.pair_logits(hidden[:, 0]).float()
        pair_loss = F.cross_entropy(logits, pair_label, ignore_index=-100, reduction="sum")
        right, pairs = (logits.argmax(1) == pair_label).sum(), (pair_label != -100).sum()
        return torch.hstack([sums, pair_loss, right]), torch.hstack([counts, pairs, pairs])


class NextSentenceObjective(PairObjective):
    """Masked language modelling and whether the second part follows (0) or is from another document (1)."""

    measures: ClassVar = {"loss": "masked", "next_sentence_loss": "pairs", "next_sentence_accuracy": "pairs"}


class SentenceOrderObjective(PairObjective):
    """Masked language modelling and whether the parts are in their order (0) or swapped (1) (ALBERT, section 3.1)."""

    measures: ClassVar = {"loss": "masked", "sentence_order_loss": "pairs", "sentence_order_accuracy": "pairs"}


OBJECTIVES = {
    "masked_lm": MaskedLMObjective,
    "next_sentence": NextSentenceObjective,
    "sentence_order": SentenceOrderObjective,
}


def why_nothing_compiles(device: torch.device) -> str | None:
    """Find out by trying why `torch.compile` does not work for the device; None if it does."""
    try:
        torch.compile(F.gelu)(torch.zeros(8, device=device))
    except Exception as error:  # no compiler, no Triton, a device too old: each raises an error of its own kind
        return str(error).strip().splitlines()[0]
    return None


def compile_in_place(objective: nn.Module, device: torch.device, in_one: bool = True) -> list[str]:
    """Have a module's forward compiled at its first call for each shape and mode; its parameters keep their names.

    If nothing can be compiled for the device, the module is left as it is, and a warning returned. FSDP, which gathers
    weights on the way, needs several graphs in place of one.
    """
    if reason := why_nothing_compiles(device):
        return [f"warning: `torch_compile` is true, and nothing compiles here ({reason}); training runs uncompiled"]
    objective.compile(fullgraph=in_one, dynamic=False)
    return []
