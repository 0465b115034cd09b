"""The one place that answers for the machine: device, compute dtype, attention, threads, memory."""

import ctypes
import gc
import os
import platform
import shutil
import sys
from importlib.util import find_spec

import torch

from .errors import ConfigError
from .threads import usable_cores

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "no": torch.float32}
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def pick_device(local_rank: int = 0) -> torch.device:
    """The accelerator of this process (cuda, xpu, mps), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.device("xpu", local_rank % torch.xpu.device_count())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """dtype of frozen weights and activations. auto: bf16 where the GPU has it, else fp16 on a GPU, fp32 on CPU and mps."""
    if choice != "auto":
        return DTYPES[choice]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.bfloat16 if device.type == "xpu" else torch.float32


def describe(device: torch.device) -> str:
    """The device in words: name and memory of a GPU, cores of a CPU."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
    if device.type == "cpu":
        return f"cpu ({usable_cores()} cores, {torch.get_num_threads()} threads)"
    return str(device)


def set_threads(choice: int | str, processes: int = 1) -> int:
    """Sets torch's CPU threads: `auto` shares the cores among the processes of this machine (a launcher's OMP_NUM_THREADS=1 is not a wish)."""
    threads = max(1, usable_cores() // processes) if choice == "auto" else int(choice)
    torch.set_num_threads(threads)
    return threads


def set_attention(unet: torch.nn.Module, choice: str, key: str) -> str:
    """Chooses the UNet's attention kernel and returns its name; ConfigError names `key` where xformers cannot be used."""
    from diffusers.models.attention_processor import AttnProcessor

    if choice == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ModuleNotFoundError, ValueError, NotImplementedError) as error:  # not there, no GPU, or not for this GPU
            why = "is not installed (pip install xformers)" if isinstance(error, ModuleNotFoundError) else f"cannot be used here: {str(error).splitlines()[0]}"
            raise ConfigError(f"{key} = 'xformers': xformers {why}. auto takes torch's own kernel, which needs no package.") from error
        return "xformers"
    if choice == "eager":
        unet.set_attn_processor(AttnProcessor())
        return "eager"
    return "sdpa"  # diffusers' default processor calls scaled_dot_product_attention


def check_compiler(device: torch.device, key: str) -> None:
    """ConfigError names `key` where torch.compile cannot work: what it needs is looked for, and then a small function is compiled."""
    lacking, way_out = _no_compiler(device), f"Set {key}: false; the run is the same without it."
    if lacking:
        raise ConfigError(f"{key} = true: {lacking} {way_out}")
    numbers = torch.arange(16, dtype=torch.float32, device=device)
    try:
        torch.compile(lambda x: torch.sin(x) * 2 + 1, dynamic=False, fullgraph=True)(numbers)
    except Exception as error:  # a compiler raises what it likes; the user is told
        raise ConfigError(f"{key} = true: torch.compile does not work on this machine: {first_line(error)} {way_out}") from error


def _no_compiler(device: torch.device) -> str:
    """What torch.compile needs for a device and does not find, with how to get it; '' where nothing is seen to be lacking."""
    if device.type in ("cuda", "xpu"):
        if find_spec("triton") is None:
            wanted = "triton-windows" if platform.system() == "Windows" else "triton"
            return f"torch.compile needs triton on this device, and it is not installed (pip install {wanted}, in the version that belongs to torch {torch.__version__})."
        if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
            return f"torch.compile needs a GPU of compute capability 7.0 or newer; this one has {'.'.join(map(str, torch.cuda.get_device_capability(device)))}."
        return "" if platform.system() == "Windows" else _no_program("CC", ("cc", "gcc", "clang"), "a C compiler", "gcc")
    windows, mac = platform.system() == "Windows", platform.system() == "Darwin"
    usual = ("cl",) if windows else ("clang++",) if mac else ("g++",)
    return _no_program("CXX", usual, "a C++ compiler", "g++") if device.type == "cpu" else ""


def _no_program(variable: str, usual: tuple[str, ...], what: str, package: str) -> str:
    names = (os.environ[variable],) if os.environ.get(variable) else usual
    if any(shutil.which(name) for name in names):
        return ""
    ways = {"Windows": "the Visual Studio Build Tools, in their command prompt", "Darwin": "xcode-select --install"}
    way = ways.get(platform.system(), f"apt install {package}, or your system's like")
    return f"torch.compile needs {what}, and {' or '.join(names)} is not found ({way})."


def first_line(error: BaseException) -> str:
    """An error's first line, with its kind, as the end of a sentence; torch's compiler wraps the error that says something."""
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0].rstrip('.:')} ({type(error).__name__})." if lines else f"{type(error).__name__}."


def check_build(way_out: str = "") -> None:
    """ConfigError when an NVIDIA driver is here but torch was built without CUDA (what plain pip gives on Windows)."""
    driver = os.path.exists("/proc/driver/nvidia/version") or os.path.exists(os.path.expandvars(r"%SystemRoot%\System32\nvcuda.dll"))
    if driver and torch.version.cuda is None and torch.version.hip is None:
        raise ConfigError("this machine has an NVIDIA GPU, but the installed torch is a CPU build. Install the CUDA build: "
                          f'pip install "torch>=2.10,<2.14" --index-url https://download.pytorch.org/whl/cu128{way_out}')


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; the host does not wait for what the device still has to do, as it would with a copy from ordinary memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.contiguous().pin_memory()  # of an expanded tensor it would make one with the same strides, to which nothing can be copied
    return tensor.to(device, non_blocking=True)


def release() -> None:
    """Gives back to the system (and of a GPU to other programs) what was let go: allocators keep it else, beside what is allocated next."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> str:
    """Highest memory use so far: allocated on a GPU, resident of this process on a CPU."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}"
    try:
        import resource
    except ImportError:  # Windows
        return "not measured here"
    unit = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss is bytes on macOS, KiB on Linux
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB resident"
