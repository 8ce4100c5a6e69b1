"""What others see of a run: checkpoints on the model hub, and model cards.

Imports every package above it.
"""
