"""Checks of the files: shards that can be read, an index that says what they hold."""

from collections import Counter
from collections.abc import Iterator

from mtp_graft.checkpoint.shards import INDEX_NAME
from mtp_graft.serving.doctor.findings import Finding, listed
from mtp_graft.serving.doctor.survey import Survey, Unusable
from mtp_graft.serving.doctor.target import Target


def unusable(error: Unusable) -> Finding:
    """Return the finding of a config or an index that cannot be used."""
    where, found = error.file.name, str(error).removeprefix(f"{error.file}: ")
    if where == INDEX_NAME:
        return Finding(
            "index-unusable",
            "error",
            where,
            found,
            "the index of a sharded safetensors checkpoint",
            "vLLM stops at an index that it cannot read, and mtp-graft at one that is missing",
            "fetch it again; for a checkpoint that was spliced, splice again",
        )
    return Finding(
        "config-unusable",
        "error",
        where,
        found,
        "the configuration of a DeepSeek-V4, with all dimensions",
        "vLLM stops before it loads anything, or takes the model for another",
        "take the config.json of the base",
    )


def unreadable_shards(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find shards that are missing, cut off or not safetensors."""
    for shard, reason in survey.unreadable.items():
        is_missing = not (survey.folder / shard).is_file()
        yield Finding(
            "shard-missing" if is_missing else "shard-unreadable",
            "error",
            shard,
            reason,
            "the whole file" + (f", since {INDEX_NAME} lists it" if is_missing else ""),
            "vLLM stops while it loads, after the shards before it: FileNotFoundError"
            if is_missing
            else "vLLM stops while it loads, after the shards before it: SafetensorError",
            "fetch the file again, and compare its size with the hub's",
        )


def entries_without_tensor(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find names that the index lists in a shard that does not hold them."""
    lost = [
        name
        for name, shard in survey.index.items()
        if shard in survey.shards and name not in survey.shards[shard]
    ]
    if lost:
        yield Finding(
            "index-entry-without-tensor",
            "error",
            f"{INDEX_NAME}: {listed(lost)}",
            f"{len(lost)} names whose shard does not hold them",
            "every name in the shard that the index gives for it",
            "vLLM reads shards, not the index, so the parameter is never filled; for a quantized "
            "checkpoint stock vLLM does not notice and computes with what was in memory. The "
            "plugin stops at the end of loading",
            "fetch the shard again; if the tensor is in no shard, splice the head again",
        )


def tensors_without_entry(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find tensors that the index does not list, among them whole shards."""
    listed_shards = set(survey.index.values())
    for shard, held in survey.shards.items():
        unlisted = [name for name in held if name not in survey.index]
        if not unlisted:
            continue
        whole = shard not in listed_shards
        yield Finding(
            "tensor-without-index-entry",
            "error",
            f"{shard}: {listed(unlisted)}",
            f"{len(unlisted)} tensors that {INDEX_NAME} does not list",
            "an entry for every tensor",
            "vLLM leaves out a shard that the index does not name: asked to draft, it stops with "
            "'MTP speculative decoding layer N weights missing from checkpoint'"
            if whole
            else "vLLM loads the tensor all the same; tools that go by the index, `mtp-graft "
            "serve` among them, take it to be absent, and serve without the head",
            "--fix writes the missing entries",
            fixable=True,
        )


def tensors_twice(survey: Survey, _target: Target) -> Iterator[Finding]:
    """Find tensors that two shards hold, or one shard under two names."""
    times = Counter(
        survey.renamed.get(name, name) for held in survey.shards.values() for name in held
    )
    if twice := sorted(name for name, count in times.items() if count > 1):
        yield Finding(
            "tensor-twice",
            "error",
            listed(twice),
            f"{len(twice)} tensors more than once",
            "every tensor once",
            "vLLM loads every copy; the one that it reads last is the one that counts",
            "remove the shard that does not belong here, or fetch the checkpoint again",
        )
