"""The implementation of `import localrun`, and what the commands do apart from parsing arguments and printing.

Users import from `localrun` (`localrun.__all__` is the stable API; docs/api.md); commands and the terminal UI import the
modules here. Importing loads only the standard library, options and the parent's side of the engine process; everything else is
loaded on demand.
"""
