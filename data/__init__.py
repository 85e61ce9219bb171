"""From text to batches: tokenizers, token shards, the embedded corpus, and the counter-based sampler.

Only `batches` needs torch; nothing here imports from the rest of heiretsu.
"""
