"""SSCD (arXiv 2202.10261), the copy-detection models that DINOv2's curation used: `sscd_disc_mixup` and its siblings.

They are published as TorchScript, which contains code. Their code has the MIT licence. Copies show best between vectors
of one preprocessing; the two published ones give somewhat different scores.
"""

from dataclasses import replace

from embedders.base import Runtime
from embedders.specs import Spec, is_url
from embedders.torch_model import TorchEmbedder
from embedders.torchscript import script_embedder

ADDRESS = "https://dl.fbaipublicfiles.com/sscd-copy-detection/{name}.torchscript.pt"

# The publisher states no hashes. This one stands in several public projects that do not depend on each other; of the
# other files no two such sources are known, so that their specifications must bring the hash or a local file.
PINS = {"sscd_disc_mixup": "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56"}

DIM = 512
LARGE_DIM = 1024


def load(spec: Spec, runtime: Runtime) -> TorchEmbedder:
    """A published model, fetched unless the option `file` names a local one. Raises EmbedderError."""
    name = spec.kind
    place = spec.options.get("file", ADDRESS.format(name=name))
    if is_url(place) and "sha256" not in spec.options and name in PINS:
        spec = replace(spec, options={**spec.options, "sha256": PINS[name]})
    dim = LARGE_DIM if name.endswith("_large") else DIM
    return script_embedder(name, place, spec, dim, runtime)
