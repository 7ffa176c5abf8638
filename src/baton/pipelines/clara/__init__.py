"""clara: documents as memory vectors, three stages, retrieval learned from answers."""
