"""Everything that leaves the process: checkpoints, logs, plots, the terminal, small files."""
