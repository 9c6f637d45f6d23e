"""Codes to vectors."""
