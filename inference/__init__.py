"""Folders of scans to findings, embeddings, search and maps."""
