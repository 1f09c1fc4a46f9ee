"""Measures what every width costs on this machine, beside other runtimes and models."""
