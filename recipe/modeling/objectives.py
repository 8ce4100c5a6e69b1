"""The objectives: masked language modelling alone, with next sentence prediction, or with sentence order prediction.

Each is a module that turns a batch into sums of losses and the counts to divide them by.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from recipe.modeling.adapters import ADAPTERS, LayerParts, Part
from recipe.modeling.attention import Sequences, attend, find_kernel
from recipe.modeling.kernels import dropout_add_norm, dropout_add_norm_sum, why_no_kernels
from recipe.modeling.unpadding import Batch, Unpadding

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of accelerate, under which matrix products are rounded
# Of a compiled function, beyond which dynamo would end the run: each size of a micro-batch, in training and evaluation.
MOST_VARIANTS = 1024


class Places(NamedTuple):
    """Where the layers attend, and which hidden states are read at the end.

    Attributes:
        where: what `attend` is told in each layer but the last.
        last_where: what it is told in the last one, where only `slots` attend.
        slots: positions whose last hidden state is read, (batch, slots) int64 within rows or (slots,) among all tokens.
        labels: int64 of the slots, -100 where nothing is predicted; within rows without the first position's slot.
        first_slots: (batch,) int64, which of (slots,) are the first positions of rows, if these are read; within rows
            it is their first slot.
    """

    where: Tensor | Sequences | None
    last_where: Tensor | Sequences | None
    slots: Tensor
    labels: Tensor
    first_slots: Tensor | None


class States(NamedTuple):
    """What a layer hands on: (batch, length, width) or (tokens, width).

    Attributes:
        hidden: the hidden states. Those of a pre-norm layer are what its last part gives: to be added to `residual`
            and normalised, which the next layer does in one kernel.
        residual: of a pre-norm layer, the sum of what all parts before have given.
    """

    hidden: Tensor
    residual: Tensor | None = None


def take(hidden: Tensor, slots: Tensor | None) -> Tensor:
    """Take the hidden states at the slots, if any, see `Places`: (batch, slots, width) or (slots, width)."""
    if slots is None:
        return hidden
    if slots.ndim == 1:  # what follows would make and keep an index of the width of the hidden states
        return hidden[slots]
    return torch.take_along_dim(hidden, slots[..., None], dim=1)


class MaskedLMObjective(nn.Module):
    """Masked language modelling of real tokens, with the last layer and the head at masked positions only.

    Masked positions are gathered into as many slots as there can be, so that shapes are static and nothing waits for
    the device; the loss ignores slots that are not used. At 15 % that saves 85 % of the projection to the vocabulary,
    a quarter of all FLOPs of roberta-base, and most of the last layer, whose other outputs nothing reads: only its keys
    and values are needed everywhere. Where there is a kernel for sequences of various lengths, the layers see no
    padding either: `arrange` takes it out of a batch.

    The model stays a plain one of transformers; at most `masked_share` of a row's positions are masked.
    """

    # What a forward pass measures, and over what in an update each is averaged: `masked` tokens or `pairs`. The sum of
    # these means is minimised; an accuracy has no gradient.
    measures: ClassVar[dict[str, str]] = {"loss": "masked"}
    # Accelerate's FSDP2 looks among the children of what this names for a final norm to make a group of, and takes any
    # class with Norm in its name for one, that of a pre-norm model too. The adapter is no module, and has none.
    base_model_prefix = "adapter"
    reads_first = False  # whether the first position of a row is read beside the masked ones

    def __init__(self, model: PreTrainedModel, masked_share: float, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
        self.masked_share = masked_share
        self.gradient_checkpointing = gradient_checkpointing
        self.unpadding: Unpadding | None = None
        self.residual_dtype: torch.dtype | None = None  # of what the fused kernel hands on; None: the plain modules run
        self.adapter = ADAPTERS[model.config.model_type](model)
        # Accelerate's FSDP wraps the classes named here, and nothing, silently, where the attribute is missing, as
        # it is in ALBERT. Layers alone: embeddings, which BERT and RoBERTa name too, share a weight with the head.
        self._no_split_modules = sorted({type(layer).__name__ for layer in self.adapter.layers()})
        self.bind_layers()

    def bind_layers(self) -> None:
        """Make `run_layer` a method of each layer, since FSDP gathers its weights for methods of its own."""
        for layer in self.adapter.layers():
            layer.run = partial(self.run_layer, layer)

    def tie_weights(self) -> None:
        """Tie the output to the input embeddings again, after an engine replaced the parameters."""
        self.model.tie_weights()

    def serve_fsdp(self) -> None:
        """Have FSDP, where it has wrapped the layers, gather their weights for `run` as for a forward."""
        for layer in {id(layer): layer for layer in self.adapter.layers()}.values():
            register_fsdp_forward_method(layer, "run")

    def arrange(self, batch: Batch) -> Batch:
        """Turn a collated batch, on the CPU, into what `forward` takes: without padding where a kernel serves that."""
        return self.unpadding(batch) if self.unpadding else batch

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor | None = None,
        pair_label: Tensor | None = None,
        **places: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Measure the objective on a batch, as the collator or `arrange` has made it.

        Args:
            input_ids: (batch, length) int64; or (tokens,), of all rows one behind the other.
            labels: (batch, length) int64, -100 where nothing is predicted; or (slots,), of the given slots.
            position_ids: int64, shaped as `input_ids`.
            token_type_ids: shaped as `input_ids`, the part of a pair; unused by a model with a single type, as
                RoBERTa is.
            pair_label: (batch,), which of two kinds a pair is, -100 for no pair; unused by masked LM alone.
            places: of a batch `attention_mask`, (batch, length), 0 at padding, missing where no row has any; or
                `document_ids`, (batch, length), in place of a mask: which document of its row a position belongs to, 0
                at padding. Positions attend to those of their own document. Of tokens, see `Unpadding`.

        Returns:
            The sum of each of `measures`, float32, and the count to divide it by, int64: (measures,) each.
        """
        if self.model.config.type_vocab_size == 1:
            token_type_ids = None
        if self.unpadding and "slots" in places:
            found = self.places_of_tokens(labels, self.unpadding, **places)
        else:
            found = self.places_in_rows(labels, **places)
        states = States(self.embed(input_ids, position_ids, token_type_ids))
        layers = self.adapter.layers()
        seeds: Sequence[Tensor | None] = [None] * len(layers)
        if self.residual_dtype:  # of the two dropouts of each layer; a layer that is recomputed drops the same
            seeds = torch.randint(2**31, (len(layers), 2), device=states.hidden.device).unbind()
        for number, layer in enumerate(layers[:-1]):
            if self.gradient_checkpointing and self.training:
                states = checkpoint(layer.run, states, found.where, seeds[number], use_reentrant=False)
            else:
                states = layer.run(states, found.where, seeds[number])
        states = layers[-1].run(states, found.last_where, seeds[-1], found.slots)
        hidden = states.hidden
        if self.adapter.norm_first:  # with the seed that the first layer, which gets nothing to add, has left
            hidden, _ = self.close(states, self.adapter.parts(layers[-1]), self.adapter.base.LayerNorm, seeds[0])
        return self.measure(hidden, found.labels, pair_label, found.first_slots)

    def places_of_tokens(
        self,
        labels: Tensor,
        unpadding: Unpadding,
        slots: Tensor,
        query_bounds: Tensor,
        key_bounds: Tensor,
        first_slots: Tensor | None = None,
    ) -> Places:
        """Say where sequences attend, see `Unpadding`."""
        longest, kernel = unpadding.max_length, unpadding.kernel
        where = Sequences(key_bounds, key_bounds, longest, longest, kernel)
        return Places(where, where._replace(query_bounds=query_bounds), slots, labels, first_slots)

    def places_in_rows(
        self, labels: Tensor, attention_mask: Tensor | None = None, document_ids: Tensor | None = None
    ) -> Places:
        """Say where the positions of rows attend, with as many slots in each as can be masked."""
        num_slots = math.ceil(self.masked_share * labels.shape[1])
        slots = (labels != -100).to(torch.uint8).topk(num_slots, dim=1, sorted=False).indices
        labels = labels.gather(1, slots)
        slots = F.pad(slots, (int(self.reads_first), 0))
        mask = slot_mask = None
        if attention_mask is not None:
            mask = slot_mask = attention_mask.bool()[:, None, None, :]
        elif document_ids is not None:
            mask = (document_ids[:, :, None] == document_ids[:, None, :])[:, None]
            slot_mask = (document_ids.gather(1, slots)[:, :, None] == document_ids[:, None, :])[:, None]
        return Places(mask, slot_mask, slots, labels, None)

    def embed(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Return the input of the first layer: (batch, length, width) or (tokens, width)."""
        is_flat = input_ids.ndim == 1
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "token_type_ids": token_type_ids}
        if is_flat:
            inputs = {name: ids if ids is None else ids[None] for name, ids in inputs.items()}
        hidden = self.adapter.embed(**inputs)
        hidden = hidden[0] if is_flat else hidden
        return hidden.to(self.residual_dtype) if self.residual_dtype else hidden

    def run_layer(
        self,
        layer: Part,
        states: States,
        where: Tensor | Sequences | None,
        seeds: Tensor | None,
        slots: Tensor | None = None,
    ) -> States:
        """Run a layer, at the slots alone if there are any, which attend to all positions.

        Args:
            layer: one of the adapter's.
            states: what the layer before has handed on, or the embeddings.
            where: see `attend`.
            seeds: (2,) int64, of its dropouts, for the fused kernel: behind attention, and behind the feed-forward
                part of this layer or, in a pre-norm model, of the one before.
            slots: see `Places`.
        """
        parts = self.adapter.parts(layer)
        hidden, residual = states
        if parts.input_norm is not None:
            hidden, residual = self.close(states, parts, parts.input_norm, seeds)
        rows = take(hidden, slots)
        residual = rows if residual is None else take(residual, slots)
        head_size = self.model.config.hidden_size // self.model.config.num_attention_heads
        query, key, value = (
            projected.unflatten(-1, (-1, head_size))
            for projected in (parts.query(rows), parts.key(hidden), parts.value(hidden))
        )
        share = parts.attention_dropout.p if parts.attention_dropout.training else 0.0
        mixed = attend(query, key, value, where, share, head_size**-0.5).flatten(-2)
        seed = None if seeds is None else seeds[0]
        attended, residual = self.add_norm(
            parts.attention_output(mixed), residual, parts.attention_output_dropout, parts.attention_norm, seed
        )
        states = States(parts.output(parts.feed_forward(attended)), residual)
        if parts.output_norm is None:
            return states
        return States(self.close(states, parts, parts.output_norm, seeds)[0])

    def close(
        self, states: States, parts: LayerParts, norm: nn.LayerNorm, seeds: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Add what a feed-forward part has given to its residual, if it has any, see `add_norm`."""
        if states.residual is None:
            return norm(states.hidden), states.hidden
        seed = None if seeds is None else seeds[1]
        return self.add_norm(states.hidden, states.residual, parts.output_dropout, norm, seed)

    def add_norm(
        self, hidden: Tensor, residual: Tensor, dropout: nn.Dropout | None, norm: nn.LayerNorm, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Add what a part of a layer gives to its residual, with dropout, and normalise the sum.

        Returns:
            The norm, and the residual of the next part: the norm too or, in a pre-norm model, the sum.
        """
        if self.residual_dtype:
            share = dropout.p if dropout is not None and dropout.training else 0.0
            seed = seed if share else None
            if self.adapter.norm_first:
                return dropout_add_norm_sum(hidden, residual, norm, share, seed)
            normed = dropout_add_norm(hidden, residual, norm, share, seed, self.residual_dtype)
            return normed, normed
        total = residual + (hidden if dropout is None else dropout(hidden))
        normed = norm(total)
        return normed, total if self.adapter.norm_first else normed

    def measure(
        self, hidden: Tensor, labels: Tensor, pair_label: Tensor | None, first_slots: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Measure the objective on the last hidden states of all slots, see `Places`."""
        logits = self.adapter.lm_head(hidden).flatten(0, -2).float()
        loss_sum = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
        return loss_sum[None], (labels != -100).sum()[None]


class PairObjective(MaskedLMObjective):
    """Masked language modelling, and telling two kinds of pairs apart by the first position (BERT, section 3.1)."""

    reads_first = True

    def __init__(self, model: PreTrainedModel, masked_share: float, gradient_checkpointing: bool = False) -> None:
        super().__init__(model, masked_share, gradient_checkpointing)
        self.adapter.add_pair_head()
        self.pair_head = self.adapter.pair_head

    def measure(
        self, hidden: Tensor, labels: Tensor, pair_label: Tensor | None, first_slots: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Measure both losses, and how many pairs are told right."""
        assert pair_label is not None
        first, hidden = (hidden[:, 0], hidden[:, 1:]) if first_slots is None else (hidden[first_slots], hidden)
        sums, counts = super().measure(hidden, labels, None, None)
        logits = self.adapter.pair_logits(first).float()
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


def try_kernels(
    config: PreTrainedConfig, device: torch.device, precision: str, rows: int, length: int
) -> tuple[str | None, bool, list[str]]:
    """Find out by trying which fast kernels serve a device.

    Args:
        config: of the model.
        device, precision: of training; the precision is named as accelerate does.
        rows, length: of a micro-batch.

    Returns:
        The kernel that attends within sequences, if one does; whether dropout, residual and layer norm run as one
        kernel; and lines for the log: what runs, and a warning for each that a GPU lacks.
    """
    size = 1, config.num_attention_heads, config.hidden_size // config.num_attention_heads
    like = torch.empty(size, dtype=PRECISIONS.get(precision, torch.float32), device=device)
    kernel, problems = find_kernel(like, rows, length)
    reason = why_no_kernels(device, config.hidden_size, ADAPTERS[config.model_type].norm_first)
    lines = []
    if kernel:
        lines.append(f"attention: {kernel}, of real tokens alone")
    elif problems:
        lines.append(f"warning: no kernel attends within sequences here ({problems}); padding is computed too")
    if reason is None:
        lines.append("dropout, residual and layer norm: one kernel")
    elif device.type == "cuda":
        lines.append(f"warning: dropout, residual and layer norm run apart, since {reason}")
    return kernel, reason is None, lines


def use_kernels(
    objective: MaskedLMObjective, device: torch.device, precision: str, rows: int, length: int, bf16_residual: bool
) -> list[str]:
    """Have an objective that is not compiled yet use what `try_kernels` finds; return its lines."""
    kernel, is_fused, lines = try_kernels(objective.model.config, device, precision, rows, length)
    if kernel:
        objective.unpadding = Unpadding(kernel, length, objective.masked_share, objective.reads_first)
    if is_fused:
        objective.residual_dtype = residual_dtype(precision, bf16_residual)
    return lines


def residual_dtype(precision: str, bf16_residual: bool) -> torch.dtype:
    """Return the type in which layers hand on what the fused kernel gives, see the option `bf16_residual`."""
    return torch.bfloat16 if bf16_residual and precision == "bf16" else torch.float32


def why_nothing_compiles(device: torch.device) -> str | None:
    """Find out by trying why `torch.compile` does not work for the device; None if it does."""
    try:
        torch.compile(F.gelu)(torch.zeros(8, device=device))
    except Exception as error:  # no compiler, no Triton, a device too old: each raises an error of its own kind
        return str(error).strip().splitlines()[0]
    return None


def compile_in_place(objective: MaskedLMObjective, device: torch.device) -> list[str]:
    """Have what an objective runs compiled at its first call for each shape and mode; parameters keep their names.

    All layers run one compiled function, so that a deep model takes no longer to compile than one of two layers. If
    nothing can be compiled for the device, the objective is left as it is, and a warning returned.
    """
    if reason := why_nothing_compiles(device):
        return [f"warning: `torch_compile` is true, and nothing compiles here ({reason}); training runs uncompiled"]
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MOST_VARIANTS
    for name in ("embed", "run_layer", "measure"):
        setattr(objective, name, torch.compile(getattr(objective, name), fullgraph=True, dynamic=False))
    objective.bind_layers()
    return []
