"""Access to the parts of a RoBERTa, BERT or ALBERT of transformers, so that one function runs the layers of all."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

Part = Any  # a module of transformers, whose own modules have names that differ from architecture to architecture


class LayerParts(NamedTuple):
    """What a layer is made of, in the order in which it runs.

    Attributes:
        input_norm: of a pre-norm layer, of its input.
        attention_norm: of what attention gives, added to its input.
        feed_forward: all up to the activation.
        output_norm: of a post-norm layer, of what the feed-forward part gives, added to its input.
        attention_output_dropout, output_dropout: None where the architecture has none.
    """

    input_norm: nn.LayerNorm | None
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_dropout: nn.Dropout
    attention_output: nn.Linear
    attention_output_dropout: nn.Dropout | None
    attention_norm: nn.LayerNorm
    feed_forward: Callable[[Tensor], Tensor]
    output: nn.Linear
    output_dropout: nn.Dropout | None
    output_norm: nn.LayerNorm | None


class BertAdapter:
    """Access to the parts of a BERT, so that padding is left out, and most of its last layer.

    The model's own forward would run all of the last layer, and would ask the device whether a mask is all ones, and
    wait for the answer.
    """

    norm_first: ClassVar[bool] = False  # whether parts of a layer have their norm before them, and not behind
    pair_head: Part = None  # what a pair objective needs and the model does not have

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Part = model
        self.base: Part = model.base_model

    def add_pair_head(self) -> None:
        """Make `pair_head`, where the model needs one."""

    def embed(self, **inputs: Tensor | None) -> Tensor:
        """Return the input of the first layer: (batch, length, width) of what is (batch, length)."""
        return self.base.embeddings(**inputs)

    def layers(self) -> list[Part]:
        """List the layers in the order in which they run."""
        return list(self.base.encoder.layer)

    def parts(self, layer: Part) -> LayerParts:
        """Return the parts of a layer."""
        attention, attended, output = layer.attention.self, layer.attention.output, layer.output
        return LayerParts(
            input_norm=None,
            query=attention.query,
            key=attention.key,
            value=attention.value,
            attention_dropout=attention.dropout,
            attention_output=attended.dense,
            attention_output_dropout=attended.dropout,
            attention_norm=attended.LayerNorm,
            feed_forward=layer.intermediate,
            output=output.dense,
            output_dropout=output.dropout,
            output_norm=output.LayerNorm,
        )

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Turn hidden states (…, width) into logits (…, vocabulary)."""
        return self.model.cls.predictions(hidden)

    def pair_logits(self, first: Tensor) -> Tensor:
        """Turn hidden states (batch, width) of the first position into logits (batch, 2)."""
        return self.model.cls.seq_relationship(self.base.pooler(first[:, None]))


class RobertaAdapter(BertAdapter):
    """Access to the parts of a RoBERTa; BERT's pair head is put beside it, outside of the model that is saved."""

    def add_pair_head(self) -> None:
        """Make a pooler and a pair head like BERT's, with weights drawn as the model's are."""
        width = self.model.config.hidden_size
        self.pair_head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))
        self.pair_head.apply(self.model._init_weights)

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Run the head, which RoBERTa keeps apart from its pooler: (…, width) to (…, vocabulary)."""
        return self.model.lm_head(hidden)

    def pair_logits(self, first: Tensor) -> Tensor:
        """Run the pooler and pair head beside the model: (batch, width) to (batch, 2)."""
        return self.pair_head(first)


class RobertaPreLayerNormAdapter(RobertaAdapter):
    """Access to the parts of a pre-norm RoBERTa, whose norms are those of what they stand before."""

    norm_first = True

    def parts(self, layer: Part) -> LayerParts:
        """Return the parts of a layer, at whose end no norm stands."""
        attention, attended, output = layer.attention.self, layer.attention.output, layer.output
        feed_forward = layer.intermediate
        return LayerParts(
            input_norm=layer.attention.LayerNorm,
            query=attention.query,
            key=attention.key,
            value=attention.value,
            attention_dropout=attention.dropout,
            attention_output=attended.dense,
            attention_output_dropout=attended.dropout,
            attention_norm=feed_forward.LayerNorm,
            feed_forward=lambda hidden: feed_forward.intermediate_act_fn(feed_forward.dense(hidden)),
            output=output.dense,
            output_dropout=output.dropout,
            output_norm=None,
        )


class AlbertAdapter(BertAdapter):
    """Access to the parts of an ALBERT, which runs one layer many times, or the layers of a few groups."""

    def embed(self, **inputs: Tensor | None) -> Tensor:
        """Return the embeddings, widened to what a layer takes: (batch, length, width) of what is (batch, length)."""
        return self.base.encoder.embedding_hidden_mapping_in(super().embed(**inputs))

    def layers(self) -> list[Part]:
        """List the layers of the groups in the order in which they run, each as often as it runs."""
        config, groups = self.model.config, self.base.encoder.albert_layer_groups
        per_group = config.num_hidden_layers / config.num_hidden_groups
        return [layer for n in range(config.num_hidden_layers) for layer in groups[int(n / per_group)].albert_layers]

    def parts(self, layer: Part) -> LayerParts:
        """Return the parts of a layer, which has no dropout at its end."""
        attention = layer.attention
        return LayerParts(
            input_norm=None,
            query=attention.query,
            key=attention.key,
            value=attention.value,
            attention_dropout=attention.attention_dropout,
            attention_output=attention.dense,
            attention_output_dropout=attention.output_dropout,
            attention_norm=attention.LayerNorm,
            feed_forward=lambda hidden: layer.activation(layer.ffn(hidden)),
            output=layer.ffn_output,
            output_dropout=None,
            output_norm=layer.full_layer_layer_norm,
        )

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Run the head, which narrows to the width of the embeddings first: (…, width) to (…, vocabulary)."""
        return self.model.predictions(hidden)

    def pair_logits(self, first: Tensor) -> Tensor:
        """Run the pooler and the head for sentence order: (batch, width) to (batch, 2)."""
        return self.model.sop_classifier(self.base.pooler_activation(self.base.pooler(first)))


ADAPTERS = {
    "roberta": RobertaAdapter,
    "roberta-prelayernorm": RobertaPreLayerNormAdapter,
    "bert": BertAdapter,
    "albert": AlbertAdapter,
}
