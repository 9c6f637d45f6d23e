"""The compressed cache: layers, positions, growing buffers, and its file."""
