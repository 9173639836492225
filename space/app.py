"""The app as a Space: `medct app` on the port that Spaces listen to. MEDCT_MODEL names another model."""

import sys

from medct.cli import main

sys.exit(main(["app", "--host", "0.0.0.0", "--port", "7860", "--cpu"]))
