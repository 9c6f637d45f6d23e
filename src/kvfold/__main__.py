"""`python -m kvfold`."""

import sys

from kvfold.cli import main

sys.exit(main())
