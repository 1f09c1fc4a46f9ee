"""The command line: each command is a paragraph that calls one core function and prints its result."""
