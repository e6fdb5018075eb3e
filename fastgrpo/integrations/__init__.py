"""fastgrpo in other frameworks' trainers: a file or a folder each, on what `seam` gives."""
