"""How a model is named: the grammar of `--model`, and the kinds and options there are. Opens nothing.

A specification is KIND[:PLACE][#key=value[&key=value...]]: `dct`, `dinov2_vitb14#size=518`,
`hf:facebook/dinov2-base#output=cls`, `vit:runs/x/model.safetensors`. Options begin behind the last `#`; a value holds
neither `#` nor `&` (a URL with `&` goes into PLACE, a path with `#` gets another `#` at its end).
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from embedders.base import EmbedderError

DINOV2 = tuple(f"dinov2_vit{size}14{registers}" for registers in ("", "_reg4") for size in "sblg")
SSCD = (
    "sscd_disc_blur",
    "sscd_disc_advanced",
    "sscd_disc_mixup",
    "sscd_disc_large",
    "sscd_imagenet_blur",
    "sscd_imagenet_advanced",
    "sscd_imagenet_mixup",
)


@dataclass(frozen=True)
class Kind:
    """What may be said of a kind of model.

    Attributes:
        place: what stands behind the colon; empty where there is no colon.
        options: the keys it takes.
    """

    place: str
    options: tuple[str, ...]


KINDS: Mapping[str, Kind] = {
    "dct": Kind("", ()),
    **{name: Kind("", ("size", "interpolation", "file", "sha256")) for name in DINOV2},
    "vit": Kind("FILE", ("size", "interpolation", "sha256")),
    "hf": Kind("NAME_OR_DIR", ("output",)),
    **{name: Kind("", ("preprocessing", "file", "sha256")) for name in SSCD},
    "torchscript": Kind("FILE", ("preprocessing", "sha256")),
}

CHOICES: Mapping[str, tuple[str, ...]] = {
    "interpolation": ("meta", "hf", "antialias"),
    "output": ("cls", "pooled"),
    "preprocessing": ("skew_320", "small_288"),
}
FORMS: Mapping[str, tuple[str, str]] = {
    "size": ("[1-9][0-9]{0,3}", "a number of pixels, such as 224"),
    "sha256": ("[0-9a-fA-F]{64}", "64 hexadecimal digits, as sha256sum prints them"),
    "file": (".+", "a path or URL"),
}


@dataclass(frozen=True)
class Spec:
    """A model as it was asked for.

    Attributes:
        kind: a key of KINDS.
        place: path, URL or hub name behind the colon; empty for kinds without.
        options: those given, checked by their form.
    """

    kind: str
    place: str
    options: Mapping[str, str]

    def __str__(self) -> str:
        tail = "&".join(f"{key}={value}" for key, value in self.options.items())
        head = f"{self.kind}:{self.place}" if self.place else self.kind
        return f"{head}#{tail}" if tail or "#" in self.place else head


def parse_spec(text: str) -> Spec:
    """The specification that `text` writes. Raises EmbedderError with one line that says what there is instead."""
    head, _, tail = text.rpartition("#") if "#" in text else (text, "", "")
    kind, colon, place = head.partition(":")
    if kind not in KINDS:
        raise EmbedderError(f"unknown model {text!r}; {_guess(kind, KINDS)}models are {summary()}")
    if KINDS[kind].place and not place:
        raise EmbedderError(f"model {text!r} is incomplete; write {kind}:{KINDS[kind].place}")
    if colon and not KINDS[kind].place:
        raise EmbedderError(f"model {text!r}: nothing follows {kind} but options; write {kind}#key=value")
    return Spec(kind, place, _options(tail, kind, text) if tail else {})


def is_url(place: str) -> bool:
    """Whether a place is an address to fetch rather than a path."""
    return "://" in place


def with_places(text: str, resolve: Callable[[str], str], is_directory: Callable[[str], bool]) -> str:
    """`text` with each path in it replaced by `resolve(path)`; URLs stay, and hub names that are no directory there."""
    spec = parse_spec(text)
    place, options = spec.place, dict(spec.options)
    if place and not is_url(place) and (spec.kind != "hf" or is_directory(resolve(place))):
        place = resolve(place)
    if "file" in options and not is_url(options["file"]):
        options["file"] = resolve(options["file"])
    return str(Spec(spec.kind, place, options))


def summary() -> str:
    """All kinds in one line."""
    dinov2 = "dinov2_vit{s,b,l,g}14[_reg4]"
    sscd = "sscd_disc_{blur,advanced,mixup,large}, sscd_imagenet_{blur,advanced,mixup}"
    return f"dct, {dinov2}, {sscd}, hf:NAME_OR_DIR, vit:FILE and torchscript:FILE"


def _options(tail: str, kind: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in tail.split("&"):
        key, equals, value = part.partition("=")
        if not equals:
            raise EmbedderError(f"model {text!r}: write options as #key=value&key=value, not {part!r}")
        if key not in KINDS[kind].options:
            known = ", ".join(KINDS[kind].options) or "none"
            guess = _guess(key, KINDS[kind].options)
            raise EmbedderError(f"model {text!r}: unknown option {key!r}; {guess}{kind} takes {known}")
        if key in options:
            raise EmbedderError(f"model {text!r}: option {key} is given twice")
        options[key] = _value(key, value, text)
    return options


def _value(key: str, value: str, text: str) -> str:
    if key in CHOICES:
        if value not in CHOICES[key]:
            raise EmbedderError(
                f"model {text!r}: unknown {key} {value!r}; {_guess(value, CHOICES[key])}"
                f"take one of {', '.join(CHOICES[key])}"
            )
        return value
    pattern, meaning = FORMS[key]
    if not re.fullmatch(pattern, value):
        raise EmbedderError(f"model {text!r}: {key} must be {meaning}, not {value!r}")
    return value.lower() if key == "sha256" else value


def _guess(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}? " if close and close[0] != word else ""
