"""Attention on codes."""
