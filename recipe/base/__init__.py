"""Ground floor: errors, files, hashing, formatting, progress bars and worker processes, for every other package.

Imports nothing of the recipe, and no torch.
"""
