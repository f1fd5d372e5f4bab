"""The few functions of `llama_cpp` that quantize a file, for tests: real blocks of 4 or 5 bits, by the `gguf` library."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

KINDS = {2: Type.Q4_0, 3: Type.Q4_1, 15: Type.Q4_1, 9: Type.Q5_1}


class Params(ctypes.Structure):
    """What the quantizer is told, as far as it is read here."""

    _fields_ = [("nthread", ctypes.c_int32), ("ftype", ctypes.c_int)]


@dataclass
class Stub:
    """Stands for the module. `spoil` changes a tensor before it is written; `code` is what the quantizer returns, when it has written
    a file."""

    spoil: Any = None
    code: int = 0
    calls: list[dict[str, Any]] = field(default_factory=list)
    heard: Any = None
    LLAMA_FTYPE_MOSTLY_Q4_0 = 2
    LLAMA_FTYPE_MOSTLY_Q4_K_M = 15
    LLAMA_FTYPE_MOSTLY_Q5_1 = 9
    _logger = SimpleNamespace(llama_log_callback=None)
    llama_log_callback = staticmethod(ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p))

    def llama_log_set(self, callback: Any, data: Any) -> None:
        self.heard = callback

    def llama_model_quantize_default_params(self) -> Params:
        return Params(0, 7)

    def llama_model_quantize(self, source: bytes, target: bytes, params: Any) -> int:
        told = params._obj
        reader = gguf.GGUFReader(source.decode())
        kinds = {one.tensor_type.name for one in reader.tensors}
        self.calls.append({"ftype": told.ftype, "nthread": told.nthread, "kinds": kinds})
        writer = gguf.GGUFWriter(target.decode(), reader.fields["general.architecture"].contents())
        for one in reader.fields.values():
            if not one.name.startswith("GGUF.") and one.name not in ("general.architecture", "general.file_type"):
                sub = one.types[-1] if one.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(one.name, one.contents(), one.types[0], sub_type=sub)
        writer.add_file_type(told.ftype)
        for tensor in reader.tensors:
            values = gguf.dequantize(np.array(tensor.data), tensor.tensor_type)
            values = self.spoil(tensor.name, values) if self.spoil else values
            kind = KINDS[told.ftype] if values.ndim > 1 else Type.F32
            writer.add_tensor(tensor.name, gguf.quantize(values.astype(np.float32), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if self.code:
            self.heard(3, b"a tensor has no columns\n", None)
        return self.code
