"""Reads vision transformers from the checkpoints people have, and writes two kinds.

A place is recognised by what it is:
- a directory: a model of transformers, Dinov2Model or Dinov2WithRegistersModel, with its weights as safetensors;
- a file FILE.safetensors: this project's own, with configuration and preprocessing as JSON in its header;
- another file: saved by torch, the published weights or a training checkpoint, of which the teacher is taken.

Reading runs no code out of a file. `embedders/layouts.py` knows the names of the weights in each kind.
"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from embedders import layouts
from embedders.base import EmbedderError
from embedders.hf import read_preprocessing
from embedders.layouts import Weights
from embedders.preprocessing import Preprocessing
from embedders.records import from_json
from embedders.vit import Interpolation, VisionTransformer, ViTConfig

FORMAT = 1
HEADER = "lvd_vit"
"""Key in the header of a file of ours; its value is JSON."""

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Header:
    """What the header of a file of ours says."""

    format: int
    config: ViTConfig
    preprocessing: Preprocessing


def read_config(place: Path, interpolation: Interpolation | None = None) -> ViTConfig:
    """What network a checkpoint holds; no weights are copied.

    Args:
        interpolation: of position embeddings, in place of what the checkpoint says or its kind implies (with registers
            "antialias"; without, "hf" in a directory of transformers and "meta" in a file of torch).

    Raises:
        EmbedderError: no checkpoint, or one of another network.
    """
    if place.is_dir():
        with _errors_name(place / CONFIG):
            return layouts.transformers_config(_json(place / CONFIG), interpolation)
    with _errors_name(place):
        if _is_own(place):
            config = _header(place).config
            return replace(config, interpolation=interpolation) if interpolation else config
        return layouts.published_config(_torch_weights(place), interpolation)


def load_vit(place: Path, interpolation: Interpolation | None = None) -> VisionTransformer:
    """The network of a checkpoint with all its weights, float32 on the CPU, in evaluation mode.

    Args:
        interpolation: as for `read_config`.

    Raises:
        EmbedderError: no checkpoint, one of another network, or keys that are missing, unexpected, of a wrong shape or
            not finite; names the file and the first keys.
    """
    config = read_config(place, interpolation)
    with torch.device("meta"):  # shapes alone: all values come from the checkpoint
        model = VisionTransformer(config)
    in_folder = place.is_dir()
    with _errors_name(_first_weights(place) if in_folder else place):
        weights = (_transformers_state if in_folder else _state)(place, model.state_dict())
    model.load_state_dict(weights, assign=True)
    return model.eval()


def checkpoint_files(place: Path) -> list[Path]:
    """The files that decide the network: the one file, or a directory's configuration and weights.

    Raises:
        EmbedderError: one of them is not there.
    """
    files = [place]
    if place.is_dir():
        with _errors_name(_first_weights(place)):
            files = sorted({place / CONFIG, _first_weights(place), *_weight_files(place)})
    for file in files:
        if not file.is_file():
            raise EmbedderError(f"{file}: no such file")
    return files


def read_own_preprocessing(place: Path) -> Preprocessing | None:
    """How images become inputs, as a file of ours or a directory of transformers says; None where nothing does.

    Raises:
        EmbedderError: what is said cannot be understood.
    """
    if place.is_dir():
        if not (place / PREPROCESSOR).is_file():
            return None
        with _errors_name(place / PREPROCESSOR):
            return _preprocessor(place / PREPROCESSOR)
    with _errors_name(place):
        return _header(place).preprocessing if _is_own(place) else None


def save_vit(model: VisionTransformer, file: Path, preprocessing: Preprocessing) -> None:
    """Writes one file of ours, FILE.safetensors, whole or not at all; a file that is there is replaced.

    Raises:
        EmbedderError: another ending, or the file cannot be written.
    """
    header = Header(format=FORMAT, config=model.config, preprocessing=preprocessing)
    with _errors_name(file):
        if not _is_own(file):
            raise ValueError("the name must end in .safetensors")
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(file)
        try:
            _write_weights(model.state_dict(), partial, {HEADER: json.dumps(asdict(header))})
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def save_transformers(model: VisionTransformer, folder: Path, preprocessing: Preprocessing) -> list[str]:
    """Writes a directory that `AutoModel` and `AutoImageProcessor` of transformers open, whole or not at all.

    Returns:
        Notes for the user: what transformers does otherwise than this model.

    Raises:
        EmbedderError: the directory is there and not empty, cannot be written, or transformers has no such network.
    """
    with _errors_name(folder):
        config = layouts.to_transformers_config(model.config)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError("is not empty; choose another directory, or remove it")
        partial = _partial(folder)
        try:
            partial.mkdir(parents=True)
            weights = layouts.to_transformers(model.state_dict(), config["model_type"])
            _write_weights(weights, partial / SINGLE, {"format": "pt"})
            _write_json(config, partial / CONFIG)
            _write_json(layouts.preprocessor_config(preprocessing), partial / PREPROCESSOR)
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    theirs = layouts.INTERPOLATIONS[config["model_type"]]
    return [] if model.config.interpolation == theirs else [_interpolation_note(model.config, theirs)]


def _interpolation_note(config: ViTConfig, theirs: Interpolation) -> str:
    return (
        f"transformers interpolates position embeddings in another way ({theirs}) than this model "
        f"({config.interpolation}): features agree at {config.image_size} pixels and differ somewhat at other sizes"
    )


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """What goes wrong inside becomes an EmbedderError of one line that starts with the path."""
    try:
        yield
    except EmbedderError:
        raise
    except ValueError as error:
        raise EmbedderError(f"{path}: {' '.join(str(error).split())}") from None
    except SafetensorError as error:
        raise EmbedderError(f"{path}: not a safetensors file, or cut short ({error})") from None
    except FileNotFoundError:
        raise EmbedderError(f"{path}: no such file") from None
    except OSError as error:
        raise EmbedderError(f"{path}: {error.strerror or error}") from None


def _is_own(file: Path) -> bool:
    return file.suffix == ".safetensors"


def _header(file: Path) -> Header:
    with safe_open(file, framework="pt") as opened:
        said = (opened.metadata() or {}).get(HEADER)
    if said is None:
        raise ValueError(f"no {HEADER} in its header; a model of transformers is opened by its directory")
    content = _object(said)
    if content.get("format") != FORMAT:
        raise ValueError(f"format {content.get('format')} in its header; this version reads format {FORMAT}")
    return from_json(Header, content, "header")


def _preprocessor(path: Path) -> Preprocessing:
    try:
        return read_preprocessing(_json(path))
    except KeyError as error:
        raise ValueError(f"{error} is missing") from None
    except TypeError as error:
        raise ValueError(str(error)) from None


def _json(path: Path) -> dict[str, Any]:
    return _object(path.read_bytes())


def _object(text: str | bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _torch_weights(file: Path) -> Weights:
    """A torch file's network by its published names; the tensors stay on disk until they are used."""
    try:
        with zipfile.ZipFile(file) as archive:
            is_script = any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        raise ValueError("not a file saved by torch (1.6 or later), or cut short") from None
    if is_script:
        raise ValueError("TorchScript, which holds code; if you trust it, open it as torchscript:FILE")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler raises whatever a damaged pickle leads it into
        raise ValueError(_unpickling_reason(error)) from None
    return layouts.published_weights(content)


def _unpickling_reason(error: Exception) -> str:
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"it holds {refused[1]} beside tensors, which could run code; save its state dict alone"
    return f"torch cannot read it ({type(error).__name__}); it is damaged, or holds more than tensors"


def _state(file: Path, expected: Mapping[str, Tensor]) -> Weights:
    """The checked weights in a file of ours or of torch."""
    return _checked(load_file(file) if _is_own(file) else _torch_weights(file), expected)


def _transformers_state(folder: Path, expected: Mapping[str, Tensor]) -> Weights:
    """The checked weights in a directory of transformers, by our names."""
    says = _json(folder / CONFIG)
    theirs = layouts.to_transformers(expected, layouts.model_type(says))
    if not says.get("use_mask_token", True):
        del theirs[layouts.MASK_TOKEN]
    found: Weights = {}
    for shard in _weight_files(folder):
        with _errors_name(shard):
            found |= load_file(shard)
    return layouts.from_transformers(_checked(found, theirs), list(expected))


def _checked(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Weights:
    """`found` as float32 in memory of its own. Raises ValueError where it is not what was expected."""
    layouts.check_keys(found, expected)
    weights = {}
    for name, value in found.items():
        if not value.is_floating_point():
            raise ValueError(f"{name} holds {str(value.dtype).removeprefix('torch.')}, no floating-point numbers")
        if not value.isfinite().all():
            raise ValueError(f"{name} holds values that are infinite or no number")
        weights[name] = value.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return weights


def _first_weights(folder: Path) -> Path:
    """Where reading a directory of transformers begins: its one file of weights, or the index of several."""
    several = (folder / INDEX).is_file() and not (folder / SINGLE).is_file()
    return folder / (INDEX if several else SINGLE)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files in a directory of transformers."""
    first = _first_weights(folder)
    if not first.is_file():
        raise ValueError("no such file; weights are read as safetensors alone")
    if first.name == SINGLE:
        return [first]
    names = _json(first).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError("no weight_map")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"weight_map names {name!r}, which is no file of its directory")
    return sorted({folder / name for name in names.values()})


def _write_weights(weights: Mapping[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """float32, from wherever they are; on the disk when this returns."""
    tensors = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in weights.items()}
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata)
    file.chmod(mode)  # safetensors lets nobody but the owner read what it writes
    with file.open("rb+") as written:
        os.fsync(written)


def _write_json(content: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _partial(path: Path) -> Path:
    """Beside the path, for what is not complete; unlike that of any other process."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
