"""Evaluation: embeddings of a source, zero-shot classification, retrieval, pictures, the run report."""
