"""Teacher signals (soft labels and embeddings), their files, and a cache of embeddings."""
