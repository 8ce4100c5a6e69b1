"""What surrounds training: launch, the folder of a run, checkpoints, metrics, hardware, plots, trackers, early ends.

Imports `recipe.base` and `recipe.arguments`.
"""
