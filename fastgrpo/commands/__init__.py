"""The command `fastgrpo`: a module or a folder for each sub-command, with its options."""
