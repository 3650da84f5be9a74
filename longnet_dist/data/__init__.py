"""Data of a run: documents in files, tokenizers, shards of tokens on disk, and the corpus of a run."""
