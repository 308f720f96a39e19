"""Engine (a loaded model), Session (one timeline of tokens), and the process they run in."""
