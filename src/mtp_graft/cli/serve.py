"""`mtp-graft serve`."""

from pathlib import Path
from typing import Annotated

import typer

from mtp_graft.cli.app import JsonOption, SpeculativeOption, app
from mtp_graft.cli.output import is_stdout, note, write_json


@app.command()
def serve(
    checkpoint: Annotated[Path, typer.Argument(help="A DeepSeek-V4 checkpoint folder.")],
    extra: Annotated[
        list[str] | None, typer.Argument(help="After --: arguments for vllm serve, as they are.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    tp: Annotated[
        int, typer.Option("--tensor-parallel-size", "--tp", min=1, help="Ranks to shard over.")
    ] = 1,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Longest sequence.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Requests at once.")] = None,
    num_speculative_tokens: SpeculativeOption = None,
    served_model_name: Annotated[list[str] | None, typer.Option(help="Name in the API.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="As vLLM names it.")] = "fp8",
    kv_cache_gib: Annotated[
        float | None, typer.Option(min=0.01, help="KV cache per rank. Default: 1 on a CPU.")
    ] = None,
    prefix_caching: Annotated[bool, typer.Option(help="Reuse shared prompt prefixes.")] = True,
    enforce_eager: Annotated[
        bool | None, typer.Option(help="Do not compile. Default: eager on a CPU.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="VLLM_API_KEY", help="Key that /v1 requests must show.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command only.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Serve a checkpoint with vLLM in the foreground, drafting with its head if it has one."""
    from mtp_graft.serving.command import LOOPBACK_HOSTS, ServeOptions, build_command
    from mtp_graft.serving.server import serve_foreground

    if json_file is not None and not dry_run:
        raise typer.BadParameter("needs --dry-run: a server has no result", param_hint="--json")
    options = ServeOptions(
        checkpoint,
        host=host,
        port=port,
        tensor_parallel_size=tp,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        num_speculative_tokens=num_speculative_tokens,
        served_model_names=tuple(served_model_name or ()),
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_gib=kv_cache_gib,
        prefix_caching=prefix_caching,
        enforce_eager=enforce_eager,
        api_key=api_key,
        extra_args=tuple(extra or ()),
    )
    if host not in LOOPBACK_HOSTS and api_key is None:
        note(f"warning: {host} is not loopback and there is no --api-key: anyone may use it")
    if dry_run:
        command = build_command(options)
        write_json({"env": command.printable_env(), "argv": list(command.argv)}, json_file)
        if not is_stdout(json_file):
            print(command.as_shell())
        return
    raise typer.Exit(serve_foreground(options, on_ready=lambda url: note(f"ready: {url}")))
