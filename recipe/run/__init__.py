"""What surrounds training: launch, the run's folder, checkpoints, metrics, hardware, plots, trackers, early stops.

Imports `recipe.base` and `recipe.arguments`.
"""
