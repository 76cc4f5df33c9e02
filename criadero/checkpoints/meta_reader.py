"""The other side of `criadero.checkpoints.meta`: turns one Meta ``.pth`` into safetensors, in a process of its own.

Run as ``python -I meta_reader.py BYTES SECONDS OUT_FOLDER IN.pth...``. Imports nothing of this package. The files are
untrusted: they are opened with ``weights_only=True``, under limits on memory, time and output: torch's own unpickler is
the first wall, a process of its own the second.
"""

import os
import resource
import sys


class Refused(Exception):
    """Why a file is not converted."""


def main(size: int, seconds: int, folder: str, sources: list[str]) -> None:
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, size + 2**26),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, 3 * size + 2**35),  # torch alone reserves several GB of address space
    ):
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):  # macOS refuses RLIMIT_AS
            continue
    for number, source in enumerate(sources):
        try:
            convert(source, f"{folder}/{number}.safetensors")
        except Refused as reason:
            sys.exit(f"{source}: cannot be read: {reason}")


def convert(source: str, target: str) -> None:
    import torch
    from safetensors.torch import save_file

    try:
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise Refused(f"it is not a plain table of tensors ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise Refused(f"it holds a {type(state).__name__}, not a table of tensors")
    tensors = {}
    left = os.path.getsize(source)
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise Refused(f"entry {str(name)[:80]!r} is not a tensor")
        if tensor.layout != torch.strided or tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise Refused(f"tensor {name[:80]!r} of type {tensor.dtype} cannot be read")
        left -= tensor.numel() * tensor.element_size()
        if left < 0:
            raise Refused(f"tensor {name[:80]!r} claims more numbers than the file stores")
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format)  # no two share their numbers
    save_file(tensors, target, metadata={"format": "pt"})


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
