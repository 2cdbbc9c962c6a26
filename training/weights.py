"""Weights in .safetensors files: their names, shapes and types, checked before memory is taken for them."""

from dataclasses import replace
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from model import Transformer

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool}


class Header(NamedTuple):
    """What a file says of a tensor."""

    shape: tuple
    dtype: torch.dtype | str  # the file's own word for one that is not known here


def read_headers(files):
    """{name: Header} of the tensors in .safetensors files; raises ValueError."""
    headers = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    tensor = file.get_slice(name)
                    dtype = tensor.get_dtype()
                    headers[name] = Header(tuple(tensor.get_shape()), SAFETENSORS_DTYPES.get(dtype, dtype))
        except SafetensorError as problem:
            raise ValueError(f"{path} can't be read: {str(problem).splitlines()[0]}") from None
    return headers


def check_weights(folder, config, files):
    """Raise ValueError unless `files` of a folder hold the weights of this network, and nothing else."""
    headers = read_headers(files)
    if config.n_layer > len(headers):  # a network of a billion layers would take hours to lay out
        raise ValueError(f"{folder}: {config.n_layer:,} layers can't be in {len(headers)} tensors")
    with torch.device("meta"):
        network = Transformer(replace(config, seq_len=1))  # without long tables of angles
    check_tensors(folder, {name: p.shape for name, p in network.named_parameters()}, headers)


def check_tensors(path, expected, tensors):
    """Raise ValueError unless `tensors` are those `expected`, {name: shape}, in a dtype of weights."""
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(f"{path} has no {missing[0]}{and_others(missing)}")
    unknown = [name for name in tensors if name not in expected]
    if unknown:
        raise ValueError(f"{path} has a {unknown[0]}{and_others(unknown)}, for which this architecture has "
                         "no place")
    misshapen = [name for name, shape in expected.items() if tuple(tensors[name].shape) != tuple(shape)]
    if misshapen:
        name = misshapen[0]
        raise ValueError(f"{path}: {name} is {tuple(tensors[name].shape)}, and should be "
                         f"{tuple(expected[name])}{and_others(misshapen)}")
    for name in expected:
        check_dtype(path, name, tensors[name].dtype)


def check_dtype(path, name, dtype):
    """Raise ValueError unless a tensor is of a type that weights are of."""
    is_known = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if not is_known or dtype.itemsize < 2:
        raise ValueError(f"{path}: {name} is {dtype}: weights are float32, bfloat16, float16 or float64")


def and_others(names):
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
