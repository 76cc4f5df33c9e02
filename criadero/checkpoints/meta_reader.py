"""The other side of `criadero.checkpoints.meta`: turns one Meta ``.pth`` into safetensors, in a process of its own.

Run as ``python -I meta_reader.py IN.pth OUT.safetensors BYTES SECONDS``. Imports nothing of this package. The file is
untrusted: it is opened with ``weights_only=True``, under limits on memory, time and output, with no way to start
programs that this process could be talked into (a sandbox in a sandbox: torch's unpickler is the first wall).
"""

import resource
import sys


def main(source: str, target: str, size: int, seconds: int) -> None:
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
    import torch
    from safetensors.torch import save_file

    try:
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        sys.exit(f"it is not a plain table of tensors ({type(error).__name__})")
    if not isinstance(state, dict):
        sys.exit(f"it holds a {type(state).__name__}, not a table of tensors")
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            sys.exit(f"entry {str(name)[:80]!r} is not a tensor")
        if tensor.layout != torch.strided or tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            sys.exit(f"tensor {name[:80]!r} of type {tensor.dtype} cannot be read")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            sys.exit(f"tensor {name[:80]!r} claims more numbers than the file stores")
        tensors[name] = tensor.contiguous()
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > size:
        sys.exit("its tensors claim more numbers than the file stores")
    save_file(tensors, target, metadata={"format": "pt"})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
