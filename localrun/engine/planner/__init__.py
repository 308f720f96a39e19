"""What fits where on a machine, and how fast that will be."""
