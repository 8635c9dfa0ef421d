"""The records that the C++ of this folder takes, field by field."""

from __future__ import annotations

import ctypes

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Problem(ctypes.Structure):
    """struct Problem of attention.h."""

    _fields_ = (
        *((name, _LONG) for name in ("query_stride", "out_stride", "block_stride", "value_offset")),
        *((name, _POINTER) for name in ("row_starts", "starts", "tables")),
        ("table_stride", _LONG),
        *((name, _INT) for name in ("num_sequences", "num_heads", "num_kv_heads")),
        *((name, _INT) for name in ("head_dim", "block_size", "window", "fixed_order")),
        ("scale", _FLOAT),
    )


class Placement(ctypes.Structure):
    """struct Placement of elementwise.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("slots", "offsets")),
        *((name, _LONG) for name in ("block_stride", "value_offset")),
        *((name, _INT) for name in ("num_heads", "num_kv_heads", "head_dim", "block_size")),
        ("eps", _FLOAT),
    )


class Product(ctypes.Structure):
    """struct Product of product.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("weights", "scales", "bias")),
        *((name, _LONG) for name in ("inputs", "outputs", "rounds")),
    )


class Layer(ctypes.Structure):
    """struct Layer of forward.cpp."""

    _fields_ = (
        *((name, _POINTER) for name in ("input_norm", "qk_norm", "post_norm")),
        *((name, Product) for name in ("qkv", "output", "gate_up", "down")),
        ("window", _LONG),
    )


class Weights(ctypes.Structure):
    """struct Model of forward.cpp."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        *((name, _POINTER) for name in ("norm", "cos", "sin")),
        ("head", Product),
        *((name, _LONG) for name in ("num_layers", "hidden", "inner", "head_dim")),
        ("eps", _FLOAT),
    )


class Step(ctypes.Structure):
    """struct Step of forward.cpp."""

    _fields_ = (
        ("rows", _LONG),
        ("positions", _POINTER),
        ("placement", Placement),
        ("attention", Problem),
        ("layer_stride", _LONG),
    )
