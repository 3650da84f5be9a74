"""Documents in files, tokenizers, shards of tokens, and what a run trains on."""
