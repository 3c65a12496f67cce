"""Artifacts in the formats of others."""
