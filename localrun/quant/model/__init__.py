"""Models and the location of their bytes, independent of the file format."""
