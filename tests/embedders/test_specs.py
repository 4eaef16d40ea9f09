from typing import get_args

import pytest

from embedders import vit
from embedders.base import EmbedderError
from embedders.specs import CHOICES, DINOV2, KINDS, SSCD, Spec, parse_spec, summary, with_places

SHA = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dct", Spec("dct", "", {})),
        ("dinov2_vits14", Spec("dinov2_vits14", "", {})),
        ("dinov2_vitg14_reg4#size=518", Spec("dinov2_vitg14_reg4", "", {"size": "518"})),
        ("hf:facebook/dinov2-base#output=cls", Spec("hf", "facebook/dinov2-base", {"output": "cls"})),
        ("vit:runs/x/model.safetensors", Spec("vit", "runs/x/model.safetensors", {})),
        ("vit:/data/run#3/m.pth#", Spec("vit", "/data/run#3/m.pth", {})),
        ("vit:/data/run#3/m.pth#size=98", Spec("vit", "/data/run#3/m.pth", {"size": "98"})),
        (
            f"vit:https://host:8080/x.pth?a=b&c=d#sha256={SHA.upper()}&interpolation=hf",
            Spec("vit", "https://host:8080/x.pth?a=b&c=d", {"sha256": SHA, "interpolation": "hf"}),
        ),
        ("sscd_disc_mixup#preprocessing=small_288", Spec("sscd_disc_mixup", "", {"preprocessing": "small_288"})),
        ("sscd_disc_large#file=a=b.pt", Spec("sscd_disc_large", "", {"file": "a=b.pt"})),
        ("torchscript:a:b.pt#preprocessing=skew_320", Spec("torchscript", "a:b.pt", {"preprocessing": "skew_320"})),
    ],
)
def test_specifications_are_read_and_written(text: str, expected: Spec) -> None:
    spec = parse_spec(text)
    assert spec == expected
    assert parse_spec(str(spec)) == spec
    assert str(spec) == text.replace(SHA.upper(), SHA)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "dtc",
            "did you mean dct? models are dct, dinov2_vit{s,b,l,g}14[_reg4], sscd_disc_{blur,advanced,mixup,large}",
        ),
        ("", "models are dct"),
        ("#size=3", "models are dct"),
        ("dinov2_vit14", "did you mean dinov2_vit"),
        ("dinov2_vits14_reg", "did you mean dinov2_vits14_reg4?"),
        ("torchscrpt:x.pt", "did you mean torchscript?"),
        ("ViT:x.pt", "unknown model 'ViT:x.pt'"),
        ("hf", "write hf:NAME_OR_DIR"),
        ("vit:", "write vit:FILE"),
        ("vit:#size=224", "write vit:FILE"),
        ("dct:x", "nothing follows dct"),
        ("sscd_disc_mixup:x.pt", "write sscd_disc_mixup#key=value"),
        ("dct#size=224", "dct takes none"),
        ("dinov2_vits14#sizes=224", "did you mean size? dinov2_vits14 takes size, interpolation, file, sha256"),
        ("hf:x#size=224", "unknown option 'size'; hf takes output"),
        ("vit:x#file=y", "unknown option 'file'"),
        ("vit:/data/run#3/m.pth", "write options as #key=value&key=value, not '3/m.pth'"),
        ("vit:x#size=98&", "not ''"),
        ("vit:x#size=98&size=112", "size is given twice"),
        ("vit:x#size=big", "size must be a number of pixels, such as 224, not 'big'"),
        ("vit:x#size=0", "size must be"),
        ("vit:x#size=-14", "size must be"),
        ("vit:x#size=99999", "size must be"),
        ("vit:x#sha256=abc", "sha256 must be 64 hexadecimal digits"),
        (f"vit:x#sha256={SHA}0", "sha256 must be 64"),
        ("dinov2_vits14#file=", "file must be a path or URL"),
        (
            "vit:x#interpolation=metta",
            "unknown interpolation 'metta'; did you mean meta? take one of meta, hf, antialias",
        ),
        ("hf:x#output=mean", "take one of cls, pooled"),
        ("sscd_disc_mixup#preprocessing=skew", "did you mean skew_320? take one of skew_320, small_288"),
    ],
)
def test_mistakes_are_one_line_that_helps(text: str, message: str) -> None:
    with pytest.raises(EmbedderError) as caught:
        parse_spec(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_summary_names_every_kind() -> None:
    words = summary().replace(" and ", ", ").replace("{", "(").split(", ")
    assert len(DINOV2) == 8 and len(SSCD) == 7 and len(KINDS) == 19
    for kind, place in (("hf", "NAME_OR_DIR"), ("vit", "FILE"), ("torchscript", "FILE")):
        assert f"{kind}:{place}" in words and KINDS[kind].place == place
    for name in SSCD:
        family, _, variant = name.rpartition("_")
        assert variant in summary().partition(family + "_{")[2].partition("}")[0].split(",")


def test_interpolations_are_those_of_the_network() -> None:
    assert CHOICES["interpolation"] == get_args(vit.Interpolation)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dct", "dct"),
        ("vit:m.pth#size=98", "vit:/base/m.pth#size=98"),
        (f"vit:https://h/m.pth#sha256={SHA}", f"vit:https://h/m.pth#sha256={SHA}"),
        ("torchscript:sub/m.pt", "torchscript:/base/sub/m.pt"),
        ("hf:facebook/dinov2-base#output=cls", "hf:facebook/dinov2-base#output=cls"),
        ("hf:local#output=cls", "hf:/base/local#output=cls"),
        ("dinov2_vits14#file=m.pth&size=98", "dinov2_vits14#file=/base/m.pth&size=98"),
        ("sscd_disc_mixup#file=https://h/m.pt", "sscd_disc_mixup#file=https://h/m.pt"),
    ],
)
def test_paths_are_found_from_elsewhere(text: str, expected: str) -> None:
    assert with_places(text, lambda path: f"/base/{path}", lambda path: path == "/base/local") == expected
