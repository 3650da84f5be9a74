"""Uses of a trained model: scores and embeddings of documents, and bits per byte by position."""
