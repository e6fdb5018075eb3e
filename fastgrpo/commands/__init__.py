"""The command `fastgrpo`: one file for each sub-command, with its options."""
