"""What a model is and where its bytes are, whatever the files look like."""
