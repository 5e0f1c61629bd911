"""The card's sections on the checkpoint itself: architecture, formats, method, origin, files."""

from collections.abc import Iterator
from pathlib import Path

from mtp_graft.bench.card.cite import SIZE_POINTER, Citations, Name, Node
from mtp_graft.bench.card.collect import CardInputs, environment_of
from mtp_graft.bench.card.tables import Block, Table
from mtp_graft.bench.markdown import NOT_MEASURED, NOTHING, yes_no
from mtp_graft.checkpoint.quantization_config import scheme_of
from mtp_graft.checkpoint.spliced import HEAD_SHARD

_PROPERTIES = {
    "num_hidden_layers": "decoder layers",
    "num_nextn_predict_layers": "layers of the MTP head",
    "n_routed_experts": "routed experts a layer",
    "num_experts_per_tok": "experts a token",
    "n_shared_experts": "shared experts a layer",
    "hidden_size": "hidden size",
    "moe_intermediate_size": "intermediate size of an expert",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "positions",
}
#: Modules that stand for the base's components, as the engine names them.
_BASE_PARTS = {
    "routed experts": "model.layers.0.ffn.experts.0.w1",
    "attention projections": "model.layers.0.attn.wq_a",
    "shared experts": "model.layers.0.ffn.shared_experts.w1",
    "LM head": "lm_head",
}
_DESCRIPTIONS = {
    "README.md": "this card",
    "config.json": "the base's, with the head and its formats entered",
    "model.safetensors.index.json": "index of base and head",
    "MTP_QUANT_MANIFEST.json": "how the head came about, with hashes",
    "MTP_QUANT_MANIFEST.md": "the same for people",
    "recipe.yaml": "the base's recipe, if it has one, and the head's",
}


def architecture(inputs: CardInputs, cite: Citations) -> Block:
    """Return the model's dimensions from its config."""
    rows = [
        [what, cite.show("count", node)]
        for key, what in _PROPERTIES.items()
        if (node := inputs.config.get(key)) is not None
    ]
    return Block(Table(["property", "value"], rows, "lr"))


def formats(inputs: CardInputs, cite: Citations) -> Block:
    """Return the format of every component, and who made it: the base's and the head's."""
    head, base = inputs.quantization, "the base's, unchanged"
    rows = [
        [f"base: {part}", _base_format(inputs.config, module, cite), base]
        for part, module in _BASE_PARTS.items()
    ]
    rows.append(["base: all else", "not quantized", base])
    experts = head["routed_experts"]
    number = cite.show("count", experts["count"])
    made = cite.show("text", head["method"])
    rows.append([Name(f"head: {number} routed experts"), cite.show("scheme", experts), made])
    rows += [
        [Name(f"head: `{names}`"), cite.show("stored", how), cite.show("text", how)]
        for names, how in head["other_tensors"].items()
    ]
    return Block(Table(["component", "format", "how"], rows, "lll"))


def _base_format(config: Node, module: str, cite: Citations) -> str:
    quantization = config.get("quantization_config")
    scheme = None if quantization is None else scheme_of(quantization.value, module)
    if quantization is None or scheme is None:
        return "not quantized"
    groups = quantization["config_groups"].items()
    return cite.show("scheme", next(group for _, group in groups if group.value == scheme))


def method(inputs: CardInputs, cite: Citations) -> list[str]:
    """Return how the head came about, step by step, as this variant was made."""
    quantization = inputs.quantization
    steps: list[str] = []
    capture = inputs.stages.get("capture")
    calibration = quantization.get("calibration")
    if calibration is not None:
        steps += _calibrated(calibration, capture, cite)
    else:
        steps.append(f"The routed experts were not calibrated: {_method(inputs, cite)}.")
    steps.append(
        "The base's shards were linked as they are; the head went into a shard of its own, and "
        "index and config were rewritten to name it."
    )
    return steps


def _method(inputs: CardInputs, cite: Citations) -> str:
    return cite.show("text", inputs.quantization["method"])


def _calibrated(calibration: Node, capture: Node | None, cite: Citations) -> Iterator[str]:
    if capture is not None:
        yield (
            f"vLLM served the base, without a head, on {cite.show('count', capture['sequences'])} "
            f"texts; a plugin recorded the residual stream of "
            f"{cite.show('count', capture['tokens'])} tokens before the final norm, calibration "
            "and held-out texts together."
        )
    tokens = calibration["tokens_per_expert"]
    yield (
        f"The head ran over {cite.show('count', calibration['calibration_tokens'])} calibration "
        f"tokens in PyTorch ({cite.show('text', calibration['replay'])}), its router deciding what "
        f"each expert sees: {cite.show('count', tokens['min'])} tokens at the least, "
        f"{cite.show('number', tokens['mean'])} in the mean, {cite.show('count', tokens['max'])} "
        f"at the most, {cite.show('count', tokens['zero'])} experts without any (policy: "
        f"{cite.show('text', calibration['zero_token_policy'])})."
    )
    yield (
        "GPTQ rounded each expert's three matrices with its own Hessian: groups of "
        f"{cite.show('count', calibration['group_size'])}, damp "
        f"{cite.show('plain', calibration['damp'])} ({cite.show('text', calibration['damping'])}), "
        f"columns in {cite.show('text', calibration['order'])} order, scales by "
        f"{cite.show('text', calibration['scale'])}."
    )


def errors(inputs: CardInputs, cite: Citations) -> Block | None:
    """Return each variant's size and error, where the quantize stage left them."""
    report = inputs.stages.get("quantize")
    if report is None:
        return None
    rows = [
        [
            Name(variant),
            "yes" if variant == inputs.spliced.variant else "",
            cite.show("plain", found["bits_per_weight"]),
            cite.show("count", found["bytes"]),
            cite.show("small percent", found["rel_error"]),
        ]
        for variant, found in report["variants"].items()
    ]
    heading = ["head", "this one", "bits a weight", "bytes", "relative error"]
    note = (
        "Bits are the routed experts', scales included. The error is Hessian-weighted, "
        "‖(W − Q) H^½‖ / ‖W H^½‖, the mean over experts and matrices, on calibration tokens."
    )
    return Block(Table(heading, rows, "llrrr"), remarks=[note])


def verification(inputs: CardInputs, cite: Citations) -> Block | None:
    """Return what verify found."""
    verify = inputs.verify
    if verify is None:
        return None
    rows = [
        ["result", "ok" if verify["ok"].value else "**failed**"],
        ["tensors compared", cite.show("count", verify["tensors"])],
        *([f"{what} tensors", cite.show("length", verify[what])]
          for what in ("missing", "unexpected", "mismatched")),
        ["largest relative error (Frobenius)", cite.show("small percent", verify["rel_error_max"])],
        ["base's files unchanged", _flag(verify, "base_unchanged")],
        ["loaded in vLLM", _flag(verify, "loaded_in_vllm")],
    ]  # fmt: skip
    return Block(Table(["verification", "result"], rows, "lr"))


def _flag(verify: Node, key: str) -> str:
    found = verify.get(key)
    return NOT_MEASURED if found is None else yes_no(bool(found.value))


def provenance(inputs: CardInputs, cite: Citations) -> list[Block]:
    """Return where base and head are from, their hashes, and what ran."""
    blocks = []
    if fetched := inputs.stages.get("fetch"):
        rows = [[which, *_source(fetched, which, cite)] for which in ("base", "upstream")]
        blocks.append(Block(Table(["checkpoint", "from", "commit"], rows, "lll")))
    blocks.append(Block(Table(["made of", "SHA-256"], list(_hashes(inputs, cite)), "ll")))
    manifests = [
        *inputs.manifests.values(),
        *(m.manifest for m in inputs.measurements if m.manifest and m.benchmark != "pipeline"),
    ]
    heading = ["stage", "commit of mtp-graft", "device", "seconds"]
    blocks.append(Block(Table(heading, [_ran(m, cite) for m in manifests], "lllr")))
    return blocks


def _ran(manifest: Node, cite: Citations) -> list[str]:
    """Return a stage's or a benchmark's commit, device and seconds."""
    commit, device = manifest.get("git_commit"), environment_of(manifest).device
    return [
        cite.show("text", manifest["stage"]),
        cite.show("text", commit) if commit else NOTHING,
        cite.show("text", device) if device else "not recorded",
        cite.show("number", manifest["seconds"]),
    ]


def _source(fetched: Node, which: str, cite: Citations) -> list[str]:
    """Return a checkpoint's hub id and commit; the path of a folder is nobody else's business."""
    if hub_id(fetched, which) is None:
        return ["a local folder", NOTHING]
    commit = fetched.get(f"{which}_commit")
    shown = cite.show("text", commit) if commit else NOTHING
    return [cite.show("text", fetched["model"][which]), shown]


def hub_id(fetched: Node | None, which: str) -> str | None:
    """Return the hub id of `base` or `upstream`; None for a folder."""
    given = None if fetched is None else str(fetched["model"][which].value)
    return None if given is None or given.startswith(("/", ".", "~")) else given


def _hashes(inputs: CardInputs, cite: Citations) -> Iterator[list[str]]:
    found = inputs.quantization["provenance"]
    for name, what in found["base"].items():
        if name != "shard_headers":
            yield [Name(f"base: `{name}`"), cite.show("text", what)]
    for name, shard in found["base"]["shard_headers"].items():
        yield [Name(f"base: header of `{name}`"), cite.show("text", shard["sha256"])]
    for name, what in found["upstream"].items():
        yield [Name(f"upstream: `{name}`"), cite.show("text", what)]
    quantize = found.get("quantize")
    if quantize is not None:
        yield ["quantize: report", cite.show("text", quantize["report"])]
        for name, what in quantize["experts"].items():
            yield [Name(f"quantize: `{name}`"), cite.show("text", what)]


def files(inputs: CardInputs, cite: Citations) -> Block:
    """Return the checkpoint's files with their sizes, and the sum."""
    folder = inputs.spliced.folder
    sizes = {
        path.relative_to(folder).as_posix(): _size(inputs.run, path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _is_hidden(path.relative_to(folder)) and path.name != "README.md"
    }
    rows = [
        [Name(f"`{name}`"), cite.show("count", size), Name(_described(name))]
        for name, size in sizes.items()
    ]
    total = cite.show("size", *sizes.values())
    return Block(Table(["file", "bytes", "what"], rows, "lrl"), remarks=[f"{total} in all."])


def _size(run: Path, path: Path) -> Node:
    """Return a file's size, which is in no JSON: the file itself is the source."""
    return Node(path.relative_to(run).as_posix(), path.stat().st_size, SIZE_POINTER)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _described(name: str) -> str:
    if name == HEAD_SHARD:
        return "the MTP head"
    return _DESCRIPTIONS.get(name, "the base's, unchanged")
