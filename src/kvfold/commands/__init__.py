"""What the commands do: `command(args)` with the options of `cli.py`; results on standard output, the rest on error."""
