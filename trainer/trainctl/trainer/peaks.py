"""What GPUs can do at most: dense matrix FLOP/s by number format, as their makers' data sheets give them.

Sources, dense figures (where a sheet gives only "with sparsity", half of it), with float32 accumulation:

- NVIDIA A100 data sheet (2021), A10, L4, L40S, T4, V100 and V100S product data sheets;
- NVIDIA H100 Tensor Core GPU data sheet (SXM, PCIe, NVL), H200 data sheet (SXM, NVL), HGX B200 specifications;
- NVIDIA Ada GPU architecture white paper (RTX 4090), Ampere GA102 white paper (RTX 3090);
- AMD Instinct MI300X data sheet.

`bf16` is also `fp16` where a device has both: on all of these they are as fast as each other.
"""

import re
from typing import Any, TypeAlias

import torch

Peaks: TypeAlias = dict[str, float]

_T = 1e12


def _ampere_or_newer(half: float, tf32: float, fp32: float, fp8: float | None = None) -> Peaks:
    peaks = {"bf16": half * _T, "fp16": half * _T, "tf32": tf32 * _T, "fp32": fp32 * _T}
    return peaks if fp8 is None else peaks | {"fp8": fp8 * _T}


# The first pattern that is found in torch's name of the device counts, so the narrower ones come first.
_TABLE: tuple[tuple[str, Peaks], ...] = (
    (r"\bB200\b", _ampere_or_newer(2250, 1125, 75, 4500)),
    (r"\bH200 NVL\b", _ampere_or_newer(835.5, 417.5, 60, 1670.5)),
    (r"\bH200\b", _ampere_or_newer(989.5, 494.5, 67, 1979)),
    (r"\bH100 NVL\b", _ampere_or_newer(835.5, 417.5, 60, 1670.5)),
    (r"\bH100 PCIe\b", _ampere_or_newer(756.5, 378, 51, 1513)),
    (r"\bH100\b", _ampere_or_newer(989.5, 494.5, 67, 1979)),
    (r"\bA100\b", _ampere_or_newer(312, 156, 19.5)),
    (r"\bL40S\b", _ampere_or_newer(362.05, 183, 91.6, 733)),
    (r"\bL4\b", _ampere_or_newer(121, 60, 30.3, 242.5)),
    (r"\bA10\b", _ampere_or_newer(125, 62.5, 31.2)),
    (r"\bRTX 4090$", _ampere_or_newer(165.2, 82.6, 82.6, 330.3)),
    (r"\bRTX 3090$", _ampere_or_newer(71, 35.6, 35.6)),
    (r"\bMI300X\b", _ampere_or_newer(1307.4, 653.7, 163.4, 2614.9)),
    (r"\bV100S\b", {"fp16": 130 * _T, "fp32": 16.4 * _T}),
    (r"\bV100-PCIE\b", {"fp16": 112 * _T, "fp32": 14 * _T}),
    (r"\bV100\b", {"fp16": 125 * _T, "fp32": 15.7 * _T}),
    (r"\bT4\b", {"fp16": 65 * _T, "fp32": 8.1 * _T}),
)


def peak_flops(device_name: str, number_format: str) -> float | None:
    """FLOP/s of a device by torch's name of it, such as `NVIDIA H100 80GB HBM3`; None where no sheet says.

    Nor does one for a slice of a device (`… MIG 1g.10gb`), which can do a share only.

    `number_format`: bf16, fp16, tf32, fp32 or fp8.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, peaks in _TABLE:
        if re.search(pattern, device_name):
            return peaks.get(number_format)
    return None


def number_format(dtype: torch.dtype) -> str | None:
    """The format in which a device multiplies matrices of a type; None for one that the table does not have."""
    if dtype is torch.float32:
        return "tf32" if _multiplies_in_tf32() else "fp32"
    if dtype in {torch.float8_e4m3fn, torch.float8_e5m2}:
        return "fp8"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)


def _multiplies_in_tf32() -> bool:
    """Whether the script lets float32 matrices be multiplied in TF32, by whichever of torch's settings."""
    matmul: Any = torch.backends.cuda.matmul
    try:
        return bool(matmul.fp32_precision == "tf32")  # it follows the older setting, and the one for all back ends
    except AttributeError:  # torch before 2.9; where this one exists, reading the older one may raise RuntimeError
        return bool(matmul.allow_tf32)
