"""The arguments of a call as frozen rows: checked once, in one layout and one dtype."""
