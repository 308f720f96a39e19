"""Engine (a loaded model) and Session (one timeline of tokens), and the process they live in."""
