"""tmlib: the library behind the TalkingMachines workbook. One concept a file; the notebooks tell the story."""
import os

__version__ = "0.1.0"

# GNU OpenMP's threads spin while they wait for one another. If another program wants one of the cores, a step takes two to four times as long by that;
# if they spin for a moment only, it takes half of that, and as long as before where nobody else does. Read when torch is loaded, so it is set here.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
