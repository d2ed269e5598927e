"""Captions -> embeddings."""
