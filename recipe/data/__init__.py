"""From text to the micro-batches of an update.

The way of the data: `corpora` (documents, by `readers`) -> `hygiene` (what is left out) -> `document_encoder` (ids and
sentence ends, by the `tokenizer`) -> `packing` (blocks) -> `sampling` (which block comes when) -> `masking` (batches).
`preprocessor` holds what this is done with. `encoders`, `token_store`, `packed_corpus` and `cached` are the cached
mode, `streaming` and `streamed` the streaming mode; `modes` picks one, and `batches` is what training sees of both.
`rows` makes rows to look at. `vocabulary` trains a tokenizer, by `trainers`.
Imports `recipe.base` and `recipe.arguments`.
"""
