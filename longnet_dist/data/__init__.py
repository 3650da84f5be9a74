"""The data of a run: sources of documents, tokenizers, shards of tokens on disk, and the corpus."""
