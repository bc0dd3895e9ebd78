"""`python -m jaxgds` is the command `jaxgds`."""

import sys

from jaxgds.cli import main


sys.exit(main())
