"""What others see of a run: checkpoints on the model hub (`hub`), and model cards (`card`, `glue_card`).

Imports every package above it. `hub` loads no torch, since the process that pushes runs beside training.
"""
