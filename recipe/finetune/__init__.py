"""Fine-tuning on a grid of jobs, and its report.

`tasks` has what is known of each task, `jobs` shares a grid among processes, `classifier` loads the model, `finetuning`
runs one job, `grid` all of them, `progress` shows how far they are, `report` writes the results. Imports every package
above it but `recipe.data`.
"""
