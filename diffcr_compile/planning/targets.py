"""What the devices that graphs are made for can and cannot do.

Every fact here was read in a source or tried, as said beside it; what is not known stands as None or
is left out. TRT stands for TensorRT. No speed of a device is stated, because none was measured on one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from diffcr_compile.errors import UsageError

# Beyond this the engine *build* fails; the parser accepts it. The limit stands in the headers of TRT
# 10.3, 10.13 and 11.1, and a build of TensorRT-RTX 1.7 on K = 4096 was refused.
TENSORRT_MAX_TOPK = 3840
# One file of opset 20 and IR 10 serves every TRT from 10.3 to 11.
PORTABLE_OPSET, PORTABLE_IR = 20, 10
# What routing adds to a block in the exported graph. MatMul is the router's.
ROUTING_OPS = ("MatMul", "TopK", "GatherND", "ScatterND")

# ONNX ops that the parser of TRT 10.1 imports (onnx-tensorrt 96e7811, ONNX names only). 10.3 has at
# least these.
_TENSORRT_10_1 = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool
    BatchNormalization Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv
    ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace DequantizeLinear Div Dropout
    Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND
    Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
    GroupNormalization HardSigmoid HardSwish Hardmax Identity If ImageScaler
    InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual
    Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean
    MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or
    PRelu Pad ParametricSoftplus Pow QuantizeLinear RNN RandomNormal RandomNormalLike
    RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
    Reshape Resize ReverseSequence RoiAlign Round ScaledTanh Scan Scatter ScatterElements
    ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign
    SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose
    Trilu Unsqueeze Upsample Where Xor
    """.split()  # noqa: SIM905 - 150 names in quotes are harder to read
)
# ATen op -> why its export is a problem, found by building 152 small graphs with TensorRT-RTX 1.7 and
# by reading the parser of TRT 10.1.
_TENSORRT_TROUBLE = {
    "aten.nonzero": "NonZero: its size depends on data; TensorRT-RTX has no plugin for it",
    "aten._unique2": "Unique is refused by the build",
    "aten.unique_dim": "Unique is refused by the build",
    "aten.masked_select": "Compress is refused by the build, and its size depends on data",
    "aten.bitwise_left_shift": "BitShift is refused by the build",
    "aten.bitwise_right_shift": "BitShift is refused by the build",
    "aten.cumsum": "CumSum is built as a loop before TRT 10.8: slow",
    "aten.scatter_add": "ScatterElements with a reduction is refused or falls to a plugin",
    "aten.scatter_reduce": "ScatterElements with a reduction is refused or falls to a plugin",
    "aten.index_add": "ScatterND with a reduction is refused by the parser",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A device with its runtime, and their limits.

    Attributes:
        name: as on the command line.
        device: what people call it.
        runtime: what runs the graph there.
        sm: CUDA compute capabilities as integers (87 is 8.7); none without a GPU.
        max_opset: newest ONNX opset that is known to be read; None for "newer than any we write".
        max_ir: newest ONNX IR version that is known to be read; None as before.
        max_topk: largest K of a TopK; None without a limit.
        importer_ops: ONNX ops that are known to be read; None for all standard ones.
        trouble: ATen op -> why its export is a problem there.
        dtypes: floating types that run there, best known first.
        fused_attention: floating types whose attention is one kernel that keeps no score matrix.
        build_memory: peak memory of an engine build / bytes of weights; None where nothing is built.
        macs_per_byte: MACs done in the time in which a byte is moved; None where nobody measured it.
        remarks: what else one should know before a build.
    """

    name: str
    device: str
    runtime: str
    sm: tuple[int, ...] = ()
    max_opset: int | None = None
    max_ir: int | None = None
    max_topk: int | None = None
    importer_ops: frozenset[str] | None = None
    trouble: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32",)
    fused_attention: tuple[str, ...] = ()
    build_memory: float | None = None
    macs_per_byte: float | None = None
    remarks: tuple[str, ...] = ()

    def unknown_ops(self, ops: Iterable[str]) -> tuple[str, ...]:
        """Those ONNX ops that the target is not known to read, each once, sorted."""
        if self.importer_ops is None:
            return ()
        return tuple(sorted(set(ops) - self.importer_ops))

    def troubles(self, aten_ops: Iterable[str]) -> dict[str, str]:
        """Those ATen ops (``aten.cumsum.default``) whose export is a problem here, and why."""
        found = {}
        for op in aten_ops:
            why = self.trouble.get(op.rpartition(".")[0])
            if why:
                found[op] = why
        return found

    def limits(self) -> str:
        """One line for people."""
        parts = [
            f"opset <= {self.max_opset}" if self.max_opset else None,
            f"IR <= {self.max_ir}" if self.max_ir else None,
            f"TopK K <= {self.max_topk}" if self.max_topk else None,
            f"types {', '.join(self.dtypes)}",
        ]
        return ", ".join(part for part in parts if part)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="ort-cpu",
            device="any CPU",
            runtime="ONNX Runtime",
            # benchmarks/results/demo_report.json, one thread: 39.9 GMAC/s in the dense loop; what
            # the compressed loop took beyond its MACs, against the bytes it moved, is 11.7 GB/s.
            macs_per_byte=3.4,
        ),
        Target(
            name="orin-jp6",
            device="Jetson Orin, JetPack 6.1 or 6.2",
            runtime="TensorRT 10.3",
            sm=(87,),
            max_opset=20,  # parser of 10.0 to 10.3: opset 9 to 20 (ONNX 1.16)
            max_ir=PORTABLE_IR,
            max_topk=TENSORRT_MAX_TOPK,
            importer_ops=_TENSORRT_10_1,
            trouble=_TENSORRT_TROUBLE,
            # fp16, int8 and int4; bf16 engines are known to run; no fp8, no fp4
            dtypes=("float16", "bfloat16", "float32"),
            fused_attention=("float16", "bfloat16"),
            build_memory=3.3,
            remarks=(
                "wrong results with dynamic shapes are reported: build one static engine per bucket",
                "compare each engine with its golden outputs on the device",
                "ScatterND must not carry the attribute `reduction`, not even 'none', before 10.9",
            ),
        ),
        Target(
            name="thor-jp7",
            device="Jetson Thor, JetPack 7.0 or 7.1",
            runtime="TensorRT 10.13",
            sm=(110,),
            max_opset=PORTABLE_OPSET,
            max_ir=PORTABLE_IR,
            max_topk=TENSORRT_MAX_TOPK,
            importer_ops=_TENSORRT_10_1,
            trouble={k: v for k, v in _TENSORRT_TROUBLE.items() if k != "aten.cumsum"},
            dtypes=("float16", "bfloat16", "float32", "float8_e4m3fn"),
            fused_attention=("float16", "bfloat16"),
            build_memory=3.3,
        ),
        Target(
            name="rtx",
            device="GeForce RTX or RTX PRO",
            runtime="TensorRT-RTX 1.7",
            sm=(75, 80, 86, 89, 120, 121),  # an engine can be built for these without a GPU
            max_opset=27,  # headers of opset 9 to 27 and IR 8 to 14 were accepted
            max_ir=14,
            max_topk=TENSORRT_MAX_TOPK,
            importer_ops=(_TENSORRT_10_1 - {"NonZero"})
            | {"RMSNormalization", "RotaryEmbedding", "Swish"},
            trouble={k: v for k, v in _TENSORRT_TROUBLE.items() if k != "aten.cumsum"},
            dtypes=("float16", "bfloat16", "float32"),
            fused_attention=("float16", "bfloat16"),
            build_memory=3.3,
            remarks=(
                "bfloat16 does not build for SM75; the opset-23 Attention op does not build in float32",
            ),
        ),
    )
}


def find_target(name: str) -> Target:
    """A target by name.

    Raises:
        UsageError: there is none of that name; lists those there are.
    """
    if name not in TARGETS:
        raise UsageError(f"there is no target {name!r}; the targets are {', '.join(TARGETS)}")
    return TARGETS[name]
