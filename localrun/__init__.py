"""localrun: DeepSeek-V4-Flash and V4-Pro on one workstation, offline."""

__version__ = "0.1.0"
