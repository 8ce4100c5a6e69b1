"""Fine-tuning on a grid of jobs, and its report.

`tasks` has what is known of each task, `jobs` shares a grid among processes, `finetuning` runs one job, `grid` all of
them, `report` writes the results. Imports every package above it but `recipe.data`.
"""
