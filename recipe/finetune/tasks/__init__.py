"""Tasks to fine-tune on.

`glue` has what is known of each task and says how to add one, `loading` reads their data, `scoring` their answers.
"""
