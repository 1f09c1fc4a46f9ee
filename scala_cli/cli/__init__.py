"""The command line: each command checks its options, calls the core and prints the result."""
