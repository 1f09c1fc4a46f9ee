"""What every width costs on this machine, beside other runtimes and other models."""
