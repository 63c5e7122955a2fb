"""Paths between models: alignment, straight and trained curves, barriers."""
