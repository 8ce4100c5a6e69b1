"""Options of the AdamW optimizer, which every script that trains a model has."""

from dataclasses import dataclass

from recipe.arguments.checks import DecayRate, NonNegativeFloat, PositiveFloat


@dataclass(kw_only=True)
class AdamArguments:
    """Options of the AdamW optimizer."""

    adam_beta1: DecayRate = 0.9
    """AdamW averages gradients with this decay rate (paper: 0.9)."""
    adam_beta2: DecayRate = 0.98
    """AdamW averages squared gradients with this decay rate (paper: 0.98)."""
    adam_epsilon: PositiveFloat = 1e-6
    """AdamW adds this to the denominator of its step (paper: 1e-6)."""
    weight_decay: NonNegativeFloat = 0.01
    """Each update shrinks weights by the learning rate times this, except biases and layer norms, which fairseq shrinks
    too (paper: 0.01 for pretraining, 0.1 for fine-tuning)."""

    @property
    def adam_betas(self) -> tuple[float, float]:
        """Both decay rates."""
        return self.adam_beta1, self.adam_beta2
