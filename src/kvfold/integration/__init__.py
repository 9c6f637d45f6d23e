"""Everything that touches a model: its shape, its attention, its files."""
