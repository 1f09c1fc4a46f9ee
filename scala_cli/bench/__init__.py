"""Measures what every width costs on this machine, in several runtimes and next to other models."""
