"""What `import localrun` offers, and what the commands do apart from arguments and printing.

Users import from `localrun` (`localrun.__all__` is the promise; docs/api.md); commands and the terminal UI import the modules here.
Standard library, options and the engine process's parent side only at import: numbers and files are loaded when they are needed.
"""
