"""From folders of scans to findings, embeddings, search and maps."""
