"""The converter and everything that writes or checks a converted model."""
