"""`python -m localrun`."""

import sys

from localrun.start import main

if __name__ == "__main__":
    sys.exit(main())
