"""From a family of widths to the file, or the repository, that somebody runs."""
