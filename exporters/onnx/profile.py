"""Which processor, or which of onnxruntime's execution providers, a file is for; and what that changes in it.

    profile    activations   what it rests on
    x86        uint8         MLAS multiplies uint8 by int8 without saturation on AVX512-VNNI, AVX-VNNI and AMX. It has no kernels for two
                             signed operands: onnxruntime rewrites int8 QDQ to uint8 where it can (`session.qdqisint8allowed` is off on
                             x86), not where several layers read one quantized value, and then computes those layers in float32
    x86_avx2   uint8         AVX2, and AVX-512 without VNNI, have VPMADDUBSW, which adds two products of uint8 and int8 in a *saturating*
                             int16: codes of weights must stay within -64 … 64 (255 * 64 * 2 < 2^15). That is a grid of 7 bits, so that
                             training knows it. A file with 8 bits runs there too with `session.x64quantprecision=1`, by slower kernels
                             for two unsigned operands
    arm        int8          Arm's SDOT and SMMLA multiply int8 by int8, and onnxruntime leaves int8 QDQ as it is there
    mobile     uint8         NNAPI, Core ML, QNN and XNNPACK: they take QDQ of standard operators (no com.microsoft), uint8 activations and
                             symmetric int8 weights, and no dynamic axes, hence `export.onnx.batch` and `export.onnx.length`

The receipt of every profile is made by onnxruntime on this machine's CPU: the numbers are the same everywhere, the speed is not.

Sources: onnxruntime docs "Quantize ONNX Models" (data type selection), "Making dynamic input shapes fixed", "QNN Execution Provider";
include/onnxruntime/core/session/onnxruntime_session_options_config_keys.h; measured for x86 (benchmarks/onnx_int8.py).
"""

from __future__ import annotations

from dataclasses import dataclass

SATURATES_ABOVE = 64
"""Largest magnitude of a weight's code that VPMADDUBSW adds to another without saturation, beside any uint8."""


@dataclass(frozen=True)
class Profile:
    """What a file for one kind of processor may hold."""

    name: str
    signed: bool = False
    """Activations in int8, else uint8."""
    saturates: bool = False
    """Whether weights beside uint8 activations must have 7 bits."""
    contrib: bool = True
    """Whether operators of onnxruntime's own domain (com.microsoft) may be in the file."""
    fixed: bool = False
    """Whether all shapes must be fixed."""

    @property
    def attention(self) -> bool:
        """Whether QAttention may be in the file; it takes uint8 activations only."""
        return self.contrib and not self.signed


PROFILES = {
    p.name: p
    for p in (
        Profile("x86"),
        Profile("x86_avx2", saturates=True),
        Profile("arm", signed=True),
        Profile("mobile", contrib=False, fixed=True),
    )
}
