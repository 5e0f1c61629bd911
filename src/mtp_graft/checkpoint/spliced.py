"""Which checkpoint a run is about: the one with the variant that its recipe chose."""

from dataclasses import dataclass
from pathlib import Path

from mtp_graft.checkpoint.files import read_object, sha256
from mtp_graft.checkpoint.quant_manifest import MANIFEST_NAME
from mtp_graft.errors import GraftError

#: The shard with the head, whatever its variant.
HEAD_SHARD = "model-mtp-w4a16.safetensors"
#: The model card, and its data.
CARD_NAME, TRACE_NAME = "README.md", "card.json"


@dataclass(frozen=True)
class Spliced:
    """A run's checkpoint."""

    variant: str
    folder: Path

    def identity(self) -> dict[str, str]:
        """Return what tells this checkpoint from another: the manifest has its origins' hashes."""
        manifest = sha256(self.folder / MANIFEST_NAME)
        return {"name": self.folder.name, "variant": self.variant, "manifest": manifest}


def find_spliced(run: Path) -> Spliced:
    """Return the checkpoint of the run's chosen variant; GraftError if there is none, or two."""
    stage = run / "splice"
    done = read_object(stage / "manifest.json", "a stage's", "run `mtp-graft splice` first")
    config = done.get("config")
    variant = config.get("variant") if isinstance(config, dict) else None
    if not isinstance(variant, str):
        raise GraftError(
            f"{stage / 'manifest.json'}: does not say which variant was chosen; run `mtp-graft "
            "splice` again"
        )
    manifests = (stage / variant).glob(f"*/{MANIFEST_NAME}")  # a hidden folder is not finished
    found = sorted(m.parent for m in manifests if not m.parent.name.startswith("."))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise GraftError(
            f"{stage / variant}: {names} found, expected one checkpoint; remove the others, or run "
            "`mtp-graft splice` again"
        )
    return Spliced(variant, found[0])
