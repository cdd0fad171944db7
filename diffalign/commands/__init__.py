"""One file, one command: its docstring is its help, `arguments` declares its options and `run` does it."""
