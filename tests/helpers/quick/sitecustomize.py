"""Python runs this when it starts where `launching.QUICKLY` is in the environment.

A process that a test starts is mostly imports: looking through them for garbage, then and at its end, takes a third of
its time.
"""

import atexit
import gc

gc.disable()
atexit.register(gc.freeze)
