"""Locating, downloading with checksums and reading corpora."""
