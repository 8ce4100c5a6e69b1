"""Tasks to fine-tune on: their data, labels, metrics and published results."""
