"""Models, objectives and the optimizer: from a batch to sums of losses, and from gradients to an update.

Imports `recipe.base` and `recipe.arguments`.
"""
