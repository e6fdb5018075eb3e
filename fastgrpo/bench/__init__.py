"""The benchmark: `fastgrpo bench`."""
