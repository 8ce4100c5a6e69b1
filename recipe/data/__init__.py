"""From text to the micro-batches of an update.

The way of the data: `corpora` (documents) -> `hygiene` (what is left out) -> `tokenizer` (ids and sentence ends) ->
`packing` (blocks) -> `sampling` (which block comes when) -> `masking` (batches). `preprocessor` holds what this is done
with. `encoders`, `token_store`, `packed_corpus` and `cached` are the cached mode, `streaming` and `streamed` the
streaming mode; `modes` picks one, and `batches` is what training sees of both. `rows` makes rows to look at, and
`vocabulary` trains a tokenizer.
Imports `recipe.base` and `recipe.arguments`.
"""
