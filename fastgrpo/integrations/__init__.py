"""fastgrpo in other frameworks' trainers, one module each."""
